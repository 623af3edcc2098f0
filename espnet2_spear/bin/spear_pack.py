#!/usr/bin/env python3
"""Pack a pre-trained student for the model zoo."""

from __future__ import annotations

import argparse
from typing import Any

from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.hub.load import load_model
from espnet2_spear.hub.pack import (
    REPO,
    Card,
    add_pack_arguments,
    check_files,
    pack_model,
)
from espnet2_spear.hub.tensors import read_settings
from espnet2_spear.zipformer.config import ZipformerConfig

DEMO = """import torch
from espnet2_spear import load_model

model = load_model("hf:{repo}")  # or the path of the zip, or of the unpacked folder
speech = torch.zeros(1, 16000)  # (B, samples), 16 kHz, in [-1, 1]
out = model(speech, torch.tensor([16000]))
out.encoder_out, out.encoder_out_lens, out.hidden_states
"""

TABLES = """In an ESPnet recipe: `frontend: spear`, `frontend_conf: {{ckpt: PATH}}`,
`normalize: null`; for recognition `asr.sh --feats_normalize none` and
`model_conf: {{extract_feats_in_collect_stats: false}}`. Features of files: `python -m
espnet2_spear.bin.spear_extract --model PATH --out DIR wav.scp`.

| student | parameters, millions | hidden size | layers | frames per second | epochs |
|---|---|---|---|---|---|
| {student} | {millions:.1f} | {width} | {layers} | {rate:g} | {epochs} |

| teacher | codebooks | entries of each | frames per second |
|---|---|---|---|
{teachers}
"""


def make_card(
    args: argparse.Namespace, conf: dict[str, Any], config: ZipformerConfig, size: int
) -> Card:
    """Return the card.

    Args:
        args: options of this command.
        conf: training configuration.
        config: of the student.
        size: its number of parameters.
    """
    teachers = conf.get("teachers") or {}
    rows = [
        f"| {name} | {t.get('num_codebooks')} | {t.get('codebook_size', 256)} | "
        f"{t.get('frame_rate', '')} |"
        for name, t in teachers.items()
    ]
    return Card(
        title="SPEAR student",
        name=args.train_config.parent.resolve().name,
        hf_task="self-supervised-learning",
        description="Pre-trained with [ESPnet](https://github.com/espnet/espnet) by "
        "masked prediction of multi-codebook tokens (SPEAR, arXiv 2510.25955) of "
        f"{len(teachers)} teachers: {', '.join(teachers)}.",
        demo=DEMO.format(repo=REPO),
        language=args.language,
        datasets=args.datasets,
        license=args.license,
        tables=TABLES.format(
            student=conf.get("student"),
            millions=size / 1e6,
            width=config.encoder_dim[0],
            layers=sum(config.num_encoder_layers),
            rate=config.frame_rate,
            epochs=conf.get("max_epoch"),
            teachers="\n".join(rows),
        ),
        results=args.results,
        config=conf,
    )


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Pack a pre-trained student with configuration and card",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_pack_arguments(parser)
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Pack; see ``--help``.

    Raises:
        PackError: a file is missing.
        CheckpointError: weights and configuration that do not belong together.
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """Pack; run it where training ran: paths are kept relative."""
    check_files(args.train_config, args.model_file, *args.option)
    model = load_model(args.model_file)
    conf = read_settings(args.train_config)
    size = sum(p.numel() for p in model.parameters())
    pack_model(
        args.outpath,
        args.train_config.parent,
        files={"model_file": args.model_file},
        configs={"train_config": (args.train_config, conf)},
        options=[*args.option, *filter(None, [args.results])],
        card=str(make_card(args, conf, model.config, size)),
    )


if __name__ == "__main__":
    main()
