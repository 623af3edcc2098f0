#!/usr/bin/env python3
"""Train a quantizer on a teacher's embeddings."""

import argparse
import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.utterances import beside_wav_scp
from espnet2_spear.mvq.baselines import train_baseline
from espnet2_spear.mvq.embedding_set import EmbeddingSet, TrainingFrames
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.report import evaluate, write_report
from espnet2_spear.mvq.training import MVQTrainer, MVQTrainingConfig
from espnet2_spear.mvq.training_options import Config, get_parser, quantizer_config
from espnet2_spear.teachers import build_teacher, load_teacher_config
from espnet2_spear.teachers.embeddings import TeacherFrames
from espnet2_spear.train.ranks import destroy_process_group_on_exit


def _frames(args: argparse.Namespace) -> TrainingFrames:
    if args.embeddings:
        if args.teacher_config or args.domains:
            raise UserError(
                "--teacher_config and --domains go with --wav_scp; --embeddings hold "
                "the teacher's output already"
            )
        return EmbeddingSet(args.embeddings, seed=args.seed)
    if not args.teacher_config:
        raise UserError("--wav_scp needs --teacher_config")
    utterances = beside_wav_scp(args.wav_scp, args.domains)
    teacher = build_teacher(*load_teacher_config(args.teacher_config))
    return TeacherFrames(
        teacher.to(args.device), utterances, args.wav_scp, seed=args.seed
    )


def _join_processes(args: argparse.Namespace) -> None:
    """Set torch.distributed up if torchrun started this process."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if args.quantizer != Quantizer.kind:
        raise UserError(f"--quantizer {args.quantizer} trains in one process")
    if args.wav_scp:
        raise UserError(
            "several processes would all compute all embeddings; store them first "
            "(spear_embed) and give --embeddings"
        )
    cuda = torch.device(args.device).type == "cuda"
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Train; see ``--help``. A killed run goes on where it was (mvq) or starts anew.

    Examples:
        % python -m espnet2_spear.bin.mvq_train --num_codebooks 16 \
            --embeddings exp/teachers/speech/embeddings \
            --output exp/teachers/speech/quantizer.pt
        % torchrun --nproc_per_node 4 -m espnet2_spear.bin.mvq_train --device cuda ...
    """
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    config = quantizer_config(args)
    with destroy_process_group_on_exit():
        _join_processes(args)
        _train(args, config)


def _train(args: argparse.Namespace, config: Config) -> None:
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
    report_dir = output.parent / "report"
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
    main()
