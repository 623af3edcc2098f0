#!/usr/bin/env python3
"""Turn the audio of a data directory into codes, by teachers and their quantizers.

Several teachers (as many values of --teacher_config, --quantizer, --name and --domains)
share one reading of the audio.
"""

import argparse
import logging
import os
from pathlib import Path

import torch

from espnet2_spear.codes.tokenize_run import TokenizeRun
from espnet2_spear.codes.tokenizer import TokenizeOptions
from espnet2_spear.fileio.datadir import DataDirError
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.shards import add_job_share_option
from espnet2_spear.fileio.utterances import beside_wav_scp
from espnet2_spear.teachers import load_teacher_config


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--teacher_config", required=True, nargs="+", help="conf/teachers/*.yaml"
    )
    parser.add_argument(
        "--quantizer",
        required=True,
        nargs="+",
        help="trained on that teacher by mvq_train",
    )
    parser.add_argument(
        "--data_dir", required=True, help="with wav.scp, utt2num_samples, utt2domain"
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        help="tokenize only these, separated by commas; the others get no codes. By "
        "default, or for 'all', all",
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--name",
        required=True,
        nargs="+",
        help="first part of the outputs: NAME.scp, NAME.failed",
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
        help="audio in a shard, which a killed run computes again; by default 600, or "
        "more so that there are at most 10000 shards",
    )
    parser.add_argument(
        "--refine_iters",
        type=int,
        help="passes of the quantizer's search; by default its own number (5 for mvq)",
    )
    parser.add_argument(
        "--extra_passes",
        type=int,
        default=0,
        help="passes after these that pair the codebooks in other ways: the error "
        "never gets larger, but the codes are not the multi-quantization library's",
    )
    parser.add_argument(
        "--max_frames",
        type=int,
        help="frames quantized at once, which bounds the memory of the search; by "
        "default 2048 on a CPU, 8192 on a GPU",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the teachers' computation; the share of codes that are those of "
        "float32 is measured first, logged and written to NAME.json",
    )
    parser.add_argument(
        "--min_agreement",
        type=float,
        default=0.5,
        help="with another dtype: if a smaller share of the codes is that of float32, "
        "nothing is tokenized",
    )
    add_job_share_option(parser)
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Tokenize; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_tokenize --data_dir dump/raw/train \
            --teacher_config conf/teachers/yamnet.yaml --domains audio --name audio \
            --quantizer exp/teachers/audio/quantizer.pt --output_dir dump/codes/train
    """
    domains = args.domains or ["all"] * len(args.name)
    if len({*map(len, (args.teacher_config, args.quantizer, args.name, domains))}) > 1:
        raise SystemExit(
            "--teacher_config, --quantizer, --name and --domains must have as many "
            "values each: one a teacher"
        )
    if len(set(args.name)) < len(args.name):
        raise SystemExit(f"--name {' '.join(args.name)}: a name is given twice")
    data_dir = Path(args.data_dir)
    if (data_dir / "segments").exists():
        raise DataDirError(
            f"{data_dir}: has segments; tokenize the formatted data (dump/raw, made by "
            "stage 2 of the recipe), where every utterance is a file"
        )
    wav_scp = data_dir / "wav.scp"
    utterances = beside_wav_scp(wav_scp)
    chosen = [
        utterances if names == "all" else beside_wav_scp(wav_scp, names)
        for names in domains
    ]
    gpus = torch.cuda.device_count() if args.ngpu < 0 else args.ngpu
    devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
    nj = args.nj or gpus or os.cpu_count() or 1
    teachers = []
    for name, config, quantizer in zip(
        args.name, args.teacher_config, args.quantizer, strict=True
    ):
        teacher, conf = load_teacher_config(config)
        options = (args.refine_iters, args.extra_passes, args.dtype, args.max_frames)
        teachers.append(TokenizeOptions(name, teacher, conf, quantizer, *options))
    if not 0 <= args.min_agreement <= 1:
        raise SystemExit(f"--min_agreement {args.min_agreement}: must be from 0 to 1")
    run = TokenizeRun(
        *(teachers, args.output_dir, args.batch_seconds, args.shard_seconds),
        min_agreement=args.min_agreement,
    )
    summaries = run.run(utterances, chosen, nj, args.num_threads, devices, args.part)
    if args.part is not None:
        return
    for name, summary in zip(args.name, summaries, strict=True):
        logging.info(
            f"{args.output_dir}/{name}.scp: codes of {summary['tokenized']} "
            f"utterances ({summary['frames']} frames), {summary['failed']} skipped, "
            f"{summary['not_asked_for']} of other domains"
        )


if __name__ == "__main__":
    main()
