#!/usr/bin/env python3
"""Embed audio with a teacher, as training data of a quantizer."""

import argparse
import logging

import torch

from espnet2_spear.fileio.explain import add_batch_options, command, option_parser
from espnet2_spear.fileio.utterances import beside_wav_scp
from espnet2_spear.teachers import build_teacher, load_teacher_config, read_teacher_yaml
from espnet2_spear.teachers.embeddings import INDEX, choose, store_embeddings


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--teacher_config", required=True, help="YAML, as conf/teachers/*.yaml"
    )
    parser.add_argument(
        "--wav_scp",
        required=True,
        help="of 16 kHz files; utt2num_samples and utt2domain are beside it",
    )
    parser.add_argument(
        "--domains", help="only these, separated by commas; by default all"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--max_frames",
        type=int,
        help="embed utterances chosen at random until there are so many embeddings; "
        "0 for all [quantizer_frames of the teacher's YAML, else all]",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of that choice")
    parser.add_argument(
        "--dtype", default="float16", choices=["float16", "float32"], help="as stored"
    )
    parser.add_argument(
        "--compute_dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the teacher's computation",
    )
    add_batch_options(parser, 20.0)
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Embed; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_embed --max_frames 200000 \
            --teacher_config conf/teachers/whisper_tiny_en.yaml --domains speech \
            --wav_scp dump/raw/train/wav.scp --output_dir exp/teachers/speech/embeddings
    """
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    name, conf = load_teacher_config(args.teacher_config)
    utterances = beside_wav_scp(args.wav_scp, args.domains)
    teacher = build_teacher(name, conf).to(args.device)
    wanted = args.max_frames
    if wanted is None:
        wanted = read_teacher_yaml(args.teacher_config)["quantizer_frames"]
    chosen = choose(utterances, teacher, wanted, args.seed)
    index = store_embeddings(
        teacher,
        chosen,
        args.output_dir,
        batch_seconds=args.batch_seconds,
        shard_seconds=args.shard_seconds,
        dtype=args.dtype,
        compute_dtype=args.compute_dtype,
    )
    frames = sum(file["frames"] for file in index["files"])
    logging.info(
        f"{args.output_dir}/{INDEX}: {frames} embeddings of {teacher.dim} from "
        f"{len(chosen) - len(index['failed'])} of {len(utterances)} utterances, "
        f"{len(index['failed'])} skipped"
    )


if __name__ == "__main__":
    main()
