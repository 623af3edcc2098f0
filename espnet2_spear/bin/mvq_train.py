#!/usr/bin/env python3
"""Train a quantizer on a teacher's embeddings."""

import argparse
import logging
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from espnet2.utils.types import str2bool

from espnet2_spear.fileio.explain import run_command
from espnet2_spear.fileio.utterances import read_utterances, select_domains
from espnet2_spear.mvq.baselines import BaselineConfig, KMeansQuantizer, train_baseline
from espnet2_spear.mvq.embeddings import EmbeddingError, EmbeddingSet, TrainingFrames
from espnet2_spear.mvq.files import KINDS
from espnet2_spear.mvq.quantizer import Quantizer, QuantizerError
from espnet2_spear.mvq.report import evaluate, write_report
from espnet2_spear.mvq.training import MVQTrainer, MVQTrainingConfig, TrainingError
from espnet2_spear.teachers import build_teacher, load_teacher_config
from espnet2_spear.teachers.base import TeacherError
from espnet2_spear.teachers.stream import TeacherFrames
from espnet2_spear.train.ranks import destroy_process_group_on_exit


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--log_level", default="INFO")
    parser.add_argument("--output", required=True, help="quantizer file to write")
    parser.add_argument(
        "--report_dir", help="by default the folder `report` beside the output"
    )
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
    group.add_argument("--quantizer", default="mvq", choices=list(KINDS))
    group.add_argument(
        "--num_codebooks", type=int, help="bytes per frame [kmeans 1, the others 16]"
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
    group.add_argument("--codebook_size", type=int, help="entries, at most 256 [256]")
    group.add_argument(
        "--iters", type=int, help="batches that a codebook is made of [200]"
    )
    return parser


def configuration(args: argparse.Namespace) -> MVQTrainingConfig | BaselineConfig:
    """Options of the chosen kind; others must not be given."""
    kind = MVQTrainingConfig if args.quantizer == Quantizer.kind else BaselineConfig
    own = {field.name for field in fields(kind)}
    other = {f.name for f in fields(MVQTrainingConfig) + fields(BaselineConfig)} - own
    given = [n for n in sorted(other - {"quantizer"}) if getattr(args, n) is not None]
    if given:
        raise TrainingError(
            f"--{given[0]} is no option of --quantizer {args.quantizer}; leave it out"
        )
    values = {name: getattr(args, name) for name in own}
    if args.num_codebooks is None:
        values["num_codebooks"] = 1 if args.quantizer == KMeansQuantizer.kind else 16
    return kind(**{name: v for name, v in values.items() if v is not None})


def _frames(args: argparse.Namespace) -> TrainingFrames:
    if args.embeddings:
        if args.teacher_config or args.domains:
            raise TrainingError(
                "--teacher_config and --domains go with --wav_scp; --embeddings hold "
                "the teacher's output already"
            )
        return EmbeddingSet(args.embeddings, seed=args.seed)
    if not args.teacher_config:
        raise TrainingError("--wav_scp needs --teacher_config")
    folder = Path(args.wav_scp).parent
    utterances = read_utterances(args.wav_scp, folder / "utt2num_samples")
    if args.domains:
        domains = args.domains.split(",")
        utterances = select_domains(utterances, folder / "utt2domain", domains)
    teacher = build_teacher(*load_teacher_config(args.teacher_config))
    return TeacherFrames(
        teacher.to(args.device), utterances, args.wav_scp, seed=args.seed
    )


def _join_processes(args: argparse.Namespace) -> None:
    """Set torch.distributed up if torchrun started this process."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if args.quantizer != Quantizer.kind:
        raise TrainingError(f"--quantizer {args.quantizer} trains in one process")
    if args.wav_scp:
        raise TrainingError(
            "several processes would all compute all embeddings; store them first "
            "(spear_embed) and give --embeddings"
        )
    cuda = torch.device(args.device).type == "cuda"
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")


def main(cmd=None):
    """Train; see ``--help``. A killed run goes on where it was (mvq) or starts anew.

    Examples:
        % python -m espnet2_spear.bin.mvq_train --num_codebooks 16 \
            --embeddings exp/teachers/speech/embeddings \
            --output exp/teachers/speech/quantizer.pt
        % torchrun --nproc_per_node 4 -m espnet2_spear.bin.mvq_train --device cuda ...
    """
    args = get_parser().parse_args(cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    config = configuration(args)
    with destroy_process_group_on_exit():
        _join_processes(args)
        _train(args, config)


def _train(args: argparse.Namespace, config: MVQTrainingConfig | BaselineConfig):
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    data = _frames(args)
    logging.info(
        f"{data.source}: {data.num_train} frames of {data.dim} to train on, "
        f"{data.num_held_out} held out"
    )
    trainer = None
    if isinstance(config, MVQTrainingConfig):
        checkpoint = output.with_name(output.name + ".checkpoint")
        trainer = MVQTrainer(config, data, checkpoint, args.device)
        quantizer = trainer.train()
        if trainer.rank:
            return
    else:
        quantizer = train_baseline(config, data, args.device)
    summary = {**evaluate(quantizer, data, config.seed), "config": asdict(config)}
    quantizer.save(
        output,
        {
            "teacher": data.index.get("teacher", {}),
            "frame_rate": data.index.get("frame_rate"),
            "training": summary,
        },
    )
    report_dir = Path(args.report_dir or output.parent / "report")
    write_report(
        report_dir, {quantizer.kind: summary}, trainer.history if trainer else ()
    )
    if trainer:
        trainer.finish()
    dead = sum(summary["train"]["dead"])
    if dead:
        entries = quantizer.num_codebooks * quantizer.codebook_size
        logging.warning(
            f"{output}: {dead} of {entries} entries are used by none of "
            f"{summary['train']['frames']} training frames"
        )
    logging.info(
        f"{output}: relative reconstruction error "
        f"{summary['held_out']['relative_error']:.4f} held out, "
        f"{summary['train']['relative_error']:.4f} on training frames; "
        f"see {report_dir}/report.md"
    )


if __name__ == "__main__":
    run_command(main, TrainingError, EmbeddingError, TeacherError, QuantizerError)
