#!/usr/bin/env python3
"""Export a student for Hugging Face: layout of the released checkpoints, code, card."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from espnet2.utils.types import str2bool

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.hub.export import export_student, fits_released_code
from espnet2_spear.hub.load import open_checkpoint
from espnet2_spear.zipformer.config import PADDING_MODES


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Write a folder that transformers.AutoModel loads",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", help="whatever espnet2_spear.load_model opens")
    parser.add_argument(
        "--part",
        help="which student, where a model holds several, such as frontend or encoder",
    )
    parser.add_argument(
        "--from_finetuned",
        type=str2bool,
        default=False,
        help="Take the student out of a model that was trained on a task; the card "
        "says so (true or false)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", help="in the card, as USER/NAME; by default --out's")
    parser.add_argument(
        "--license", help="of the weights, as the hub names it, such as apache-2.0"
    )
    parser.add_argument(
        "--about", default="", help="for the card: what it was trained on, and how"
    )
    parser.add_argument(
        "--padding", choices=PADDING_MODES, help="write this into the configuration"
    )
    parser.add_argument(
        "--overwrite",
        type=str2bool,
        default=False,
        help="Replace the files of an earlier export (true or false)",
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Export; see ``--help``.

    Example:
        % python -m espnet2_spear.bin.spear_export exp/spear_base/valid.loss.best.pth \
            --out hub/spear-base --name me/spear-base --license cc-by-4.0
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """Open, write, and list what was written."""
    conf = {"padding": args.padding} if args.padding else {}
    opened = open_checkpoint(args.source, conf, args.part)
    about = args.about
    if opened.finetuned:
        if not args.from_finetuned:
            kinds = sorted({name.split(".")[0] for name in opened.left_out})
            raise UserError(
                f"{args.source}: is more than a student (it has {', '.join(kinds)}), "
                "and its student was trained for a task: say --from_finetuned true"
            )
        about = f"{about} Taken out of a model that was fine-tuned.".strip()
    model, name = opened.model, args.name or args.out.name
    card = (name, args.license, about)
    export_student(model, args.out, *card, args.overwrite, args.source)
    if not fits_released_code(model.config):
        logging.warning(
            "heads or embedding are of other widths than the released students': the "
            "released modelling code cannot load this, the code in the folder can"
        )
    files = ", ".join(sorted(p.name for p in args.out.iterdir()))
    print(f"{args.out}: {files}")


if __name__ == "__main__":
    main()
