#!/usr/bin/env python3
"""Upload a packed model to the Hugging Face hub; by default only say what would go."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description="Upload a packed model to the Hugging Face hub",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--packed", type=Path, required=True, help="xxx.zip, xxx.tgz")
    parser.add_argument("--repo_id", type=str, required=True, help="user/name")
    parser.add_argument(
        "--dry_run",
        type=lambda x: {"true": True, "false": False}[x.lower()],
        default=True,
        help="Only list what would be sent (true or false)",
    )
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Upload or list; see ``--help``.

    Raises:
        FileNotFoundError: there is no such packed model.
    """
    args = get_parser().parse_args(cmd)
    if not args.packed.is_file():
        raise FileNotFoundError(f"{args.packed}: no packed model; run stage 8 first")
    from espnet2.main_funcs.pack_funcs import unpack

    with tempfile.TemporaryDirectory() as folder:
        unpack(args.packed, folder)
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        total = sum(p.stat().st_size for p in files)
        # The hub shows the card at the top of the repository.
        cards = [p for p in files if p.name == "README.md"]
        if cards and not (Path(folder) / "README.md").exists():
            (Path(folder) / "README.md").write_bytes(cards[0].read_bytes())
        verb = "would be sent" if args.dry_run else "are being sent"
        print(f"{len(files)} files, {total / 1e6:.1f} MB, {verb} to {args.repo_id}:")
        for p in files:
            print(f"  {p.relative_to(folder)} ({p.stat().st_size} bytes)")
        if args.dry_run:
            print("Dry run: nothing was sent; --dry_run false (--skip_upload false)")
            return
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(args.repo_id, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=args.repo_id)
        print(f"Uploaded to {args.repo_id}")


if __name__ == "__main__":
    main()
