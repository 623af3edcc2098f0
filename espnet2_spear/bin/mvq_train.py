#!/usr/bin/env python3
"""Train a multi-codebook quantizer on a teacher's embeddings."""

import argparse
import logging
from pathlib import Path

import torch
from espnet2.utils.types import str2bool

from espnet2_spear.mvq.embeddings import EmbeddingSet
from espnet2_spear.mvq.report import evaluate, write_report
from espnet2_spear.mvq.training import MVQTrainer, MVQTrainingConfig


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--log_level", default="INFO")
    parser.add_argument("--embeddings", required=True, help="folder of spear_embed")
    parser.add_argument("--output", required=True, help="quantizer file to write")
    parser.add_argument(
        "--report_dir", help="by default the folder `report` beside the output"
    )
    parser.add_argument(
        "--num_codebooks",
        type=int,
        default=16,
        help="codebooks of 256 entries: bytes per frame",
    )
    parser.add_argument(
        "--standardize",
        type=str2bool,
        default=True,
        help="per channel, by statistics of the training frames",
    )
    parser.add_argument(
        "--iters_phase1",
        type=int,
        default=10000,
        help="steps with twice the codebooks of 16 entries",
    )
    parser.add_argument(
        "--iters_phase2", type=int, default=10000, help="steps with 256 entries"
    )
    parser.add_argument("--batch_frames", type=int, default=1024, help="per step")
    parser.add_argument(
        "--lr", type=float, default=0.005, help="of phase 1; half of it in phase 2"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--num_threads", type=int, default=0, help="0 for torch's own choice"
    )
    return parser


def main(cmd=None):
    """Train; see ``--help``. A killed run goes on where it was.

    Example:
        % python -m espnet2_spear.bin.mvq_train --num_codebooks 16 \
            --embeddings exp/teachers/speech/embeddings \
            --output exp/teachers/speech/quantizer.pt
    """
    args = get_parser().parse_args(cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    data = EmbeddingSet(args.embeddings, seed=args.seed)
    logging.info(
        f"{args.embeddings}: {data.num_train} frames of {data.dim} to train on, "
        f"{data.num_held_out} held out"
    )
    config = MVQTrainingConfig(
        num_codebooks=args.num_codebooks,
        standardize=args.standardize,
        iters_phase1=args.iters_phase1,
        iters_phase2=args.iters_phase2,
        batch_frames=args.batch_frames,
        lr=args.lr,
        seed=args.seed,
    )
    trainer = MVQTrainer(
        config, data, output.with_name(output.name + ".checkpoint"), args.device
    )
    quantizer = trainer.train()
    summary = evaluate(quantizer, data, config)
    quantizer.save(
        output,
        {
            "teacher": data.index.get("teacher", {}),
            "frame_rate": data.index.get("frame_rate"),
            "training": summary,
        },
    )
    report_dir = Path(args.report_dir or output.parent / "report")
    write_report(report_dir, summary, trainer.history)
    trainer.finish()
    logging.info(
        f"{output}: relative reconstruction error "
        f"{summary['held_out']['relative_error']:.4f} held out, "
        f"{summary['train']['relative_error']:.4f} on training frames; "
        f"see {report_dir}/report.md"
    )


if __name__ == "__main__":
    main()
