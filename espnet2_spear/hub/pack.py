"""Pack files for the model zoo: ESPnet's archive, with the plugin's stamp in it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from espnet2_spear.errors import UserError
from espnet2_spear.hub.packed import STAMP, write_stamp


class PackError(UserError):
    """A model that cannot be packed; names the file and the remedy."""


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files to pack, and what the card says besides what they tell."""
    parser.add_argument("--train_config", type=Path, required=True, help="config.yaml")
    parser.add_argument("--model_file", type=Path, required=True, help="xxx.pth")
    parser.add_argument("--outpath", type=Path, required=True, help="xxx.zip, xxx.tgz")
    parser.add_argument(
        "--option", type=Path, nargs="*", default=[], help="Further files to include"
    )
    group = parser.add_argument_group("Model card")
    group.add_argument("--results", type=Path, help="RESULTS.md to quote")
    group.add_argument(
        "--language", nargs="+", default=["noinfo"], help="codes, such as en"
    )
    group.add_argument("--datasets", nargs="*", default=[], help="names")
    group.add_argument("--license", default="cc-by-4.0", help="of the weights")


def check_files(*paths: Path) -> None:
    """See that files are there before anything is written.

    Raises:
        PackError: one is not.
    """
    for path in paths:
        if not path.exists():
            raise PackError(f"{path}: no such file; train first")


def base_of(paths: Sequence[Path]) -> Path:
    """Return the folder that all names in the archive are relative to.

    The working directory, as everywhere in ESPnet, or, where a file lies outside it,
    the folder that holds all of them: an absolute name would make an unpacked model
    reach for the training tree.
    """
    here = Path.cwd().resolve()
    resolved = [path.resolve() for path in paths]
    if all(path.is_relative_to(here) for path in resolved):
        return here
    # One above the model's folder, so that its name is in the archive.
    parents = [path.parent if path.is_file() else path for path in resolved]
    return Path(os.path.commonpath(parents)).parent


def relocate(config: Any, paths: Sequence[Path], base: Path) -> Any:
    """Name the packed files in a configuration as they are named in the archive."""
    names = {path.resolve(): str(path.resolve().relative_to(base)) for path in paths}
    if isinstance(config, dict):
        return {k: relocate(v, paths, base) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [relocate(v, paths, base) for v in config]
    if isinstance(config, str) and "/" in config:
        return names.get(Path(config).resolve(), config)
    return config


def pack_model(
    files: Mapping[str, Path],
    yaml_files: Mapping[str, Path],
    options: Sequence[Path],
    outpath: Path,
) -> None:
    """Write the archive (zip or tar, by its suffix).

    Args:
        files: argument of the inference class -> weights.
        yaml_files: the same for configurations; the stamp is written beside the first.
        options: what else goes into it.
        outpath: the archive.

    Raises:
        PackError: a file is missing.
    """
    from espnet2.main_funcs.pack_funcs import pack

    check_files(*files.values(), *yaml_files.values(), *options)
    stamp = write_stamp(next(iter(yaml_files.values())).with_name(STAMP))
    options = [*options, stamp]
    base = base_of([*files.values(), *yaml_files.values(), *options])
    outpath = outpath.resolve()
    outpath.parent.mkdir(parents=True, exist_ok=True)
    with _inside(base):
        pack(
            files={k: v.resolve() for k, v in files.items()},
            yaml_files={k: v.resolve() for k, v in yaml_files.items()},
            option=[v.resolve() for v in options],
            outpath=outpath,
        )


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
