#!/usr/bin/env python3
"""Upload a packed model to the Hugging Face hub; by default only say what would go."""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from espnet2.utils.types import str2bool

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.explain import command, option_parser
from espnet2_spear.fileio.hashes import hash_of
from espnet2_spear.hub.pack import CARD, REPO
from espnet2_spear.hub.packed import check_only_tensors, read_packed, unpack

_REPO_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")


def prepare(packed: Path, folder: Path, repo_id: str) -> list[Path]:
    """Unpack a model into a folder, which then is what the repository will hold.

    As ESPnet's uploads: the archive's members under their names, unchanged, and the
    card at the top, where the repository's name is put in.

    Args:
        packed: the archive.
        folder: a new one, to unpack into.
        repo_id: ``user/name``.

    Returns:
        all files, the card first.

    Raises:
        CheckpointError: unsafe or corrupt, no packed model, or no card in it.
    """
    unpack(packed, folder)
    check_only_tensors(packed, read_packed(packed, folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    cards = [path for path in files if path.name == CARD]
    if not cards:
        raise CheckpointError(
            f"{packed}: has no model card ({CARD}); pack it by spear_pack or task_pack"
        )
    card, top = min(cards, key=lambda path: len(path.parts)), folder / CARD
    text = card.read_text(encoding="utf-8").replace(REPO, repo_id)
    card.unlink()
    top.write_text(text, encoding="utf-8")
    return [top, *(path for path in files if path != card)]


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = option_parser("Upload a packed model to the Hugging Face hub")
    parser.add_argument("--packed", type=Path, required=True, help="xxx.zip, xxx.tgz")
    parser.add_argument("--repo_id", type=_repo_id, required=True, help="user/name")
    parser.add_argument(
        "--dry_run",
        type=str2bool,
        default=True,
        help="Only list what would be sent (true or false)",
    )
    parser.add_argument(
        "--private", action="store_true", help="A new repository is seen by you alone"
    )
    return parser


def _repo_id(text: str) -> str:
    if not _REPO_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text}: must be user/name")
    return text


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Upload or list; see ``--help``.

    Raises:
        FileNotFoundError: there is no such packed model.
        CheckpointError: see :func:`prepare`.
    """
    if not args.packed.is_file():
        raise FileNotFoundError(f"{args.packed}: no packed model; run stage 8 first")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        files = prepare(args.packed, folder, args.repo_id)
        verb = "would be sent" if args.dry_run else "are being sent"
        print(f"{len(files)} files {verb} to {args.repo_id}, in one commit:")
        for path in files:
            facts = f"{path.stat().st_size} bytes, {hash_of(path)}"
            print(f"  {path.relative_to(folder).as_posix()} ({facts})")
        if args.dry_run:
            print(f"The card, {CARD}:\n\n{files[0].read_text(encoding='utf-8')}")
            print("Dry run: nothing was sent; --dry_run false (--skip_upload false)")
            return
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(args.repo_id, exist_ok=True, private=args.private)
        info = api.upload_folder(
            repo_id=args.repo_id, folder_path=folder, commit_message="Upload a model"
        )
        print(f"Uploaded: {info.commit_url}")


if __name__ == "__main__":
    main()
