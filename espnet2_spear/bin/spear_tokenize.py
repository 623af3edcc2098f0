#!/usr/bin/env python3
"""Turn the audio of a data directory into codes, by a teacher and its quantizer."""

import argparse
import logging
import os
from pathlib import Path

import torch

from espnet2_spear.fileio.datadir import DataDirError
from espnet2_spear.teachers import load_teacher_config
from espnet2_spear.teachers.extract import read_utterances, select_domains
from espnet2_spear.teachers.tokenize import TokenizeOptions, TokenizeRun


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--log_level", default="INFO")
    parser.add_argument(
        "--teacher_config", required=True, help="YAML, as conf/teachers/*.yaml"
    )
    parser.add_argument(
        "--quantizer", required=True, help="trained on that teacher by mvq_train"
    )
    parser.add_argument(
        "--data_dir", required=True, help="with wav.scp, utt2num_samples, utt2domain"
    )
    parser.add_argument(
        "--domains",
        help="tokenize only these, separated by commas; the others get no codes. By "
        "default all",
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--name", required=True, help="first part of the outputs: NAME.scp, NAME.failed"
    )
    parser.add_argument(
        "--nj", type=int, default=0, help="processes; 0 for one a CPU core or GPU"
    )
    parser.add_argument(
        "--num_threads", type=int, default=1, help="threads of each process"
    )
    parser.add_argument(
        "--ngpu",
        type=int,
        default=-1,
        help="GPUs to use; 0 for none, -1 for all that are visible",
    )
    parser.add_argument(
        "--batch_seconds",
        type=float,
        default=20.0,
        help="audio in a batch, padding included",
    )
    parser.add_argument(
        "--shard_seconds",
        type=float,
        default=600.0,
        help="audio in a shard, which a killed run computes again",
    )
    parser.add_argument(
        "--refine_iters",
        type=int,
        help="passes of the quantizer's search; by default its own number (5 for mvq)",
    )
    return parser


def main(cmd=None):
    """Tokenize; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_tokenize --data_dir dump/raw/train \
            --teacher_config conf/teachers/yamnet.yaml --domains audio --name audio \
            --quantizer exp/teachers/audio/quantizer.pt --output_dir dump/codes/train
    """
    args = get_parser().parse_args(cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    name, conf = load_teacher_config(args.teacher_config)
    data_dir = Path(args.data_dir)
    if (data_dir / "segments").exists():
        raise DataDirError(
            f"{data_dir}: has segments; tokenize the formatted data (dump/raw, made by "
            "stage 2 of the recipe), where every utterance is a file"
        )
    utterances = read_utterances(data_dir / "wav.scp", data_dir / "utt2num_samples")
    everyone = [utterance.utt for utterance in utterances]
    if args.domains:
        utterances = select_domains(
            utterances, data_dir / "utt2domain", args.domains.split(",")
        )
    gpus = torch.cuda.device_count() if args.ngpu < 0 else args.ngpu
    devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
    nj = args.nj or gpus or os.cpu_count() or 1
    options = TokenizeOptions(
        teacher=name,
        teacher_conf=conf,
        quantizer=args.quantizer,
        batch_seconds=args.batch_seconds,
        shard_seconds=args.shard_seconds,
        refine_iters=args.refine_iters,
    )
    run = TokenizeRun(options, args.output_dir, args.name)
    summary = run.run(utterances, everyone, nj, args.num_threads, devices)
    logging.info(
        f"{args.output_dir}/{args.name}.scp: codes of {summary['tokenized']} "
        f"utterances ({summary['frames']} frames), {summary['failed']} skipped, "
        f"{summary['not_asked_for']} of other domains"
    )


if __name__ == "__main__":
    main()
