"""Options of mvq_train, also for those who plan a run of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from espnet2.utils.types import str2bool

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import option_parser, read_options
from espnet2_spear.mvq.baselines import BaselineConfig, KMeansQuantizer
from espnet2_spear.mvq.files import KINDS
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.training import MVQTrainingConfig

Config = MVQTrainingConfig | BaselineConfig


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of mvq_train."""
    parser = option_parser("Train a quantizer on a teacher's embeddings.")
    parser.add_argument("--output", required=True, help="file; `report` lies beside it")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--num_threads", type=int, default=0, help="0 for torch's own choice"
    )
    group = parser.add_argument_group(
        "embeddings", "stored ones, or the audio and teacher to compute them with"
    )
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--embeddings", help="folder of spear_embed")
    source.add_argument(
        "--wav_scp",
        help="utterance and path of a 16 kHz file a line; utt2num_samples and "
        "utt2domain beside it",
    )
    group.add_argument("--teacher_config", help="YAML; needed with --wav_scp")
    group.add_argument(
        "--domains", help="with --wav_scp: only these, separated by commas"
    )
    group = parser.add_argument_group(
        "quantizer", "Options without a value take the default of their kind"
    )
    group.add_argument("--quantizer", default=Quantizer.kind, choices=list(KINDS))
    group.add_argument(
        "--num_codebooks", type=int, help="codes per frame [kmeans 1, the others 16]"
    )
    group.add_argument(
        "--standardize",
        type=str2bool,
        default=True,
        help="per channel, by statistics of the training frames",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--batch_frames", type=int, help="per step [mvq 1024, the others 4096]"
    )
    group = parser.add_argument_group("mvq alone")
    group.add_argument(
        "--iters_phase1",
        type=int,
        help="steps with twice the codebooks of 16 entries [10000]",
    )
    group.add_argument(
        "--iters_phase2", type=int, help="steps with 256 entries [10000]"
    )
    group.add_argument("--lr", type=float, help="of phase 1; half in phase 2 [0.005]")
    group = parser.add_argument_group("kmeans, rvq and random alone")
    group.add_argument(
        "--codebook_size",
        type=int,
        help="entries; codes of more than 256 take two bytes in memory and four in an "
        "ark [256]",
    )
    group.add_argument(
        "--iters", type=int, help="batches that a codebook is made of [200]"
    )
    return parser


def quantizer_config(args: argparse.Namespace) -> Config:
    """Options of the chosen kind of quantizer.

    Raises:
        UserError: an option of another kind, or values out of range.
    """
    kind = MVQTrainingConfig if args.quantizer == Quantizer.kind else BaselineConfig
    own = {field.name for field in fields(kind)}
    other = {f.name for f in fields(MVQTrainingConfig) + fields(BaselineConfig)} - own
    given = [n for n in sorted(other - {"quantizer"}) if getattr(args, n) is not None]
    if given:
        raise UserError(
            f"--{given[0]} is no option of --quantizer {args.quantizer}; leave it out"
        )
    values = {name: getattr(args, name) for name in own}
    if args.num_codebooks is None:
        values["num_codebooks"] = 1 if args.quantizer == KMeansQuantizer.kind else 16
    return kind(**{name: v for name, v in values.items() if v is not None})


def parse_options(words: Sequence[str]) -> Config:
    """Read options as mvq_train would, before anything is computed.

    Args:
        words: of its command line, such as ``--quantizer kmeans --codebook_size 2000``;
            without input and output.

    Raises:
        ValueError: an unknown option, one of another kind, or values out of range.
    """
    unused = ["--output", "", "--embeddings", ""]
    return quantizer_config(read_options(get_parser(), [*unused, *words]))
