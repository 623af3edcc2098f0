#!/usr/bin/env python3
"""Greedy CTC decoding: the best token of each frame, repetitions and blanks removed.

ESPnet's ``asr_inference`` searches prefixes, which on a CPU takes about as long as the
audio; this takes one pass of the encoder. Output files are the same.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from torch import Tensor

from espnet2_spear.fileio.explain import command

BLANK = 0  # first of ESPnet's tokens


def collapse(path: Tensor) -> list[int]:
    """Turn the best tokens of all frames (T,) into a token sequence.

    Repetitions are merged first, so that blanks keep double letters apart.
    """
    return [token for token in path.unique_consecutive().tolist() if token != BLANK]


def decode(args: argparse.Namespace) -> int:
    """Decode a set into ``<output_dir>/1best_recog/{text,token,token_int}``.

    Returns:
        number of utterances.
    """
    # ESPnet takes seconds to import: not before the options are right.
    from espnet2.fileio.datadir_writer import DatadirWriter
    from espnet2.tasks.asr import ASRTask
    from espnet2.text.build_tokenizer import build_tokenizer
    from espnet2.text.token_id_converter import TokenIDConverter

    device = "cuda" if args.ngpu > 0 else "cpu"
    model, train_args = ASRTask.build_model_from_file(
        args.asr_train_config, args.asr_model_file, device
    )
    if model.ctc is None:
        raise ValueError(
            f"{args.asr_train_config}: a model without CTC (ctc_weight 0); decode it "
            "with espnet2.bin.asr_inference"
        )
    model.eval()
    if args.quantize_asr_model:
        linear = {torch.nn.Linear}  # what ESPnet's Speech2Text quantizes
        model = torch.ao.quantization.quantize_dynamic(model, linear, torch.qint8)
    tokenizer = build_tokenizer(train_args.token_type, bpemodel=train_args.bpemodel)
    converter = TokenIDConverter(token_list=model.token_list)
    loader = ASRTask.build_streaming_iterator(
        args.data_path_and_name_and_type,
        dtype="float32",
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        preprocess_fn=ASRTask.build_preprocess_fn(train_args, False),
        collate_fn=ASRTask.build_collate_fn(train_args, False),
        ngpu=args.ngpu,
        inference=True,
    )
    count = 0
    with DatadirWriter(Path(args.output_dir) / "1best_recog") as writer:
        for keys, batch in loader:
            speech = batch["speech"].to(device)
            with torch.inference_mode():
                out, lengths = model.encode(speech, batch["speech_lengths"].to(device))
                out = out[0] if isinstance(out, tuple) else out
                paths = model.ctc.argmax(out).cpu()
            for key, path, length in zip(keys, paths, lengths.tolist(), strict=True):
                ids = collapse(path[:length])
                tokens = converter.ids2tokens(ids)
                writer["token"][key] = " ".join(tokens)
                writer["token_int"][key] = " ".join(map(str, ids))
                writer["text"][key] = tokenizer.tokens2text(tokens)
                count += 1
    return count


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    from espnet2.utils.types import str2bool, str2triple_str

    parser = argparse.ArgumentParser(
        description="Greedy CTC decoding of an ESPnet2 ASR model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--ngpu", type=int, default=0, help="0: on the CPU")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument(
        "--batch_size",
        type=int,
        default=1,
        help="Utterances at once; padding can change the output slightly",
    )
    parser.add_argument(
        "--data_path_and_name_and_type",
        type=str2triple_str,
        action="append",
        required=True,
        help="Such as dump/raw/test/wav.scp,speech,sound",
    )
    parser.add_argument(
        "--quantize_asr_model",
        type=str2bool,
        default=False,
        help="Linear layers in 8-bit integers, on a CPU",
    )
    parser.add_argument("--asr_train_config", required=True)
    parser.add_argument("--asr_model_file", required=True)
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Decode; see ``--help``."""
    import espnet2_spear  # noqa: F401  (makes frontend spear known to ESPnet)

    count = decode(args)
    logging.info(f"decoded {count} utterances into {args.output_dir}")


if __name__ == "__main__":
    main()
