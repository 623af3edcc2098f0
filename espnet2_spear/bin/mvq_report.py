#!/usr/bin/env python3
"""Write a page on a quantizer, or on two side by side: errors and usage of codes."""

import argparse
import logging
from collections import Counter
from pathlib import Path

from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.mvq.embedding_set import INDEX, EmbeddingSet
from espnet2_spear.mvq.files import load_quantizer
from espnet2_spear.mvq.quantizer import AbsQuantizer, QuantizerError
from espnet2_spear.mvq.report import evaluate, write_report
from espnet2_spear.teachers.base import difference


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--quantizer",
        required=True,
        action="append",
        help="file of ours or of the multi-quantization library; once or twice",
    )
    parser.add_argument(
        "--embeddings",
        required=True,
        action="append",
        help="folder of spear_embed, whose held-out frames are used; once, or once for "
        "each quantizer",
    )
    parser.add_argument(
        "--refine_iters", type=int, help="passes; by default each kind's own number"
    )
    parser.add_argument("--seed", type=int, help="by default that of each training")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--output_dir", required=True, help="for report.md, report.json and plots"
    )
    return parser


def _check_match(quantizer: AbsQuantizer, data: EmbeddingSet, file: str) -> None:
    """Raise QuantizerError if the quantizer is known to be of another teacher."""
    remedy = "give the embeddings of the quantizer's own teacher"
    if quantizer.dim != data.dim:
        raise QuantizerError(
            f"{file}: is a quantizer of {quantizer.dim} dimensions, "
            f"{data.folder / INDEX} has {data.dim}; {remedy}"
        )
    own, other = quantizer.metadata.get("teacher"), data.index.get("teacher")
    if own and other and (differs := difference(own, other)):
        raise QuantizerError(
            f"{file}: was trained on another teacher than that of "
            f"{data.folder / INDEX} ({differs}); {remedy}"
        )


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Measure and write; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.mvq_report --output_dir exp/rvq_and_mvq \
            --quantizer exp/teachers/speech/quantizer.pt --quantizer exp/rvq.pt \
            --embeddings exp/teachers/speech/embeddings
    """
    files, folders = args.quantizer, args.embeddings
    if len(files) > 2 or len(folders) not in (1, len(files)):
        raise SystemExit(
            f"{len(files)} quantizers and {len(folders)} folders of embeddings: give "
            "one or two quantizers, and one folder or one for each"
        )
    folders *= len(files) // len(folders)
    measured = []
    for file, folder in zip(files, folders, strict=True):
        quantizer = load_quantizer(file).to(args.device)
        config = (quantizer.metadata.get("training") or {}).get("config") or {}
        seed = config.get("seed", 0) if args.seed is None else args.seed
        data = EmbeddingSet(folder, seed=seed)
        _check_match(quantizer, data, file)
        try:
            summary = evaluate(quantizer, data, seed, args.refine_iters)
        except QuantizerError as error:
            raise QuantizerError(f"{file} on {folder}: {error}") from error
        summary.update(file=file, embeddings=folder)
        if config:
            summary["config"] = config
        measured.append((f"{quantizer.kind} {quantizer.identity}", summary))
        error = summary["held_out"]["relative_error"]
        logging.info(f"{file}: relative error {error:.4f} on held-out frames")
    # One quantizer may be measured twice, on two folders.
    counts = Counter(name for name, _ in measured)
    summaries = {
        name if counts[name] == 1 else f"{name} ({n})": summary
        for n, (name, summary) in enumerate(measured, 1)
    }
    write_report(Path(args.output_dir), summaries)
    logging.info(f"{args.output_dir}/report.md written")


if __name__ == "__main__":
    main()
