#!/usr/bin/env python3
"""Upload a packed model to the Hugging Face hub; by default only say what would go."""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
from pathlib import Path

from espnet2.utils.types import str2bool

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.hub.pack import CARD, REPO
from espnet2_spear.hub.packed import check_weights, read_packed, unpack

_REPO_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")


def prepare(packed: Path, folder: Path, repo_id: str) -> dict[str, bytes | Path]:
    """Unpack a model and return what the repository will hold.

    As ESPnet's uploads: the archive's members under their names, unchanged, and the
    card at the top, where the repository's name is put in.

    Args:
        packed: the archive.
        folder: a new one, to unpack into.
        repo_id: ``user/name``.

    Returns:
        path in the repository -> content, or the file that holds it.

    Raises:
        CheckpointError: unsafe or corrupt, no packed model, or no card in it.
    """
    unpack(packed, folder)
    check_weights(packed, read_packed(packed, folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    cards = [path for path in files if path.name == CARD]
    if not cards:
        raise CheckpointError(
            f"{packed}: has no model card ({CARD}); pack it by spear_pack or task_pack"
        )
    card = min(cards, key=lambda path: len(path.parts))
    content: dict[str, bytes | Path] = {
        CARD: card.read_text(encoding="utf-8").replace(REPO, repo_id).encode()
    }
    for path in files:
        if path != card:
            content[path.relative_to(folder).as_posix()] = path
    return content


def describe(content: dict[str, bytes | Path]) -> list[str]:
    """Lines of name, bytes and SHA-256."""
    lines = []
    for name, value in content.items():
        data = value if isinstance(value, bytes) else value.read_bytes()
        lines.append(
            f"  {name} ({len(data)} bytes, {hashlib.sha256(data).hexdigest()})"
        )
    return lines


def send(content: dict[str, bytes | Path], repo_id: str, private: bool) -> str:
    """Make the repository if it is not there, and one commit; return its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True, private=private)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=value)
        for name, value in content.items()
    ]
    info = api.create_commit(repo_id, operations, commit_message="Upload a model")
    return info.commit_url


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Upload a packed model to the Hugging Face hub",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
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


def main(cmd: list[str] | None = None) -> None:
    """Upload or list; see ``--help``.

    Raises:
        FileNotFoundError: there is no such packed model.
        CheckpointError: see :func:`prepare`.
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """List what would be sent, and send it unless this is a dry run."""
    if not args.packed.is_file():
        raise FileNotFoundError(f"{args.packed}: no packed model; run stage 8 first")
    with tempfile.TemporaryDirectory() as work:
        content = prepare(args.packed, Path(work) / "model", args.repo_id)
        lines = describe(content)
        verb = "would be sent" if args.dry_run else "are being sent"
        print(f"{len(lines)} files {verb} to {args.repo_id}, in one commit:")
        print("\n".join(lines))
        if args.dry_run:
            print(f"The card, {CARD}:\n")
            print(content[CARD].decode())
            print("Dry run: nothing was sent; --dry_run false (--skip_upload false)")
            return
        print(f"Uploaded: {send(content, args.repo_id, args.private)}")


if __name__ == "__main__":
    main()
