"""Pack files for the model zoo: ESPnet's archive, with the plugin's stamp and a card.

As ``espnet2.main_funcs.pack_funcs.pack``, but for the names in the archive: each file
has one inside it, wherever it lies here. ESPnet's pack names files outside the working
directory absolutely, links among them, and such a model opens nowhere else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear.errors import UserError
from espnet2_spear.hub.packed import META, STAMP, write_stamp

CARD = "README.md"  # the hub shows it at the top of a repository
CONFIG = "config.yaml"  # the name that asr.sh --download_model looks for


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


def names_in_archive(folder: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Choose names: the path from here, or one in the model's folder.

    Args:
        folder: of the model.
        files: to be packed.

    Returns:
        file, without links -> name; always with a folder in it.
    """
    here = Path.cwd().resolve()
    home = "exp/" + folder.resolve().name
    if folder.resolve().is_relative_to(here) and folder.resolve() != here:
        home = folder.resolve().relative_to(here).as_posix()
    names: dict[Path, str] = {}
    for file in files:
        # As the user names it: a link inside the recipe has a name there.
        path = Path(file).absolute()
        inside = path.is_relative_to(here) and ".." not in path.parts
        name = path.relative_to(here).as_posix() if inside else f"{home}/{path.name}"
        name = name if "/" in name else f"{home}/{name}"
        number = 2
        while name in names.values() and path.resolve() not in names:
            name = f"{home}/{number}/{path.name}"
            number += 1
        names.setdefault(path.resolve(), name)
    return names


def relocate(config: Any, names: Mapping[Path, str]) -> Any:
    """Name the packed files in a configuration as they are named in the archive."""
    if isinstance(config, dict):
        return {k: relocate(v, names) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [relocate(v, names) for v in config]
    if isinstance(config, str) and config and Path(config).is_file():
        return names.get(Path(config).resolve(), config)
    return config


def pack_model(
    outpath: Path,
    folder: Path,
    files: Mapping[str, Path],
    configs: Mapping[str, tuple[Path, Mapping[str, Any]]],
    options: Iterable[Path],
    card: str,
) -> None:
    """Write the archive (zip or tar, by its suffix).

    Args:
        outpath: the archive.
        folder: of the model; the stamp and the card are in it.
        files: argument of the inference class -> weights.
        configs: the same for configurations: the file, and what to pack of it, under
            the name ``config.yaml`` in the file's folder. Files that it names and that
            are packed get their names in the archive.
        options: what else goes into it.
        card: text of the model card.

    Raises:
        PackError: a file is missing, or a suffix that is no archive's.
    """
    import torch
    from espnet2 import __version__ as espnet_version
    from espnet2.main_funcs.pack_funcs import Archiver

    check_files(*files.values(), *options)
    options = [f for path in options for f in _files_below(path)]
    sources = [config.with_name(CONFIG) for config, _ in configs.values()]
    names = names_in_archive(
        folder, [*files.values(), *sources, *options, folder / CARD, folder / STAMP]
    )

    def named(path: Path) -> str:
        return names[path.resolve()]

    meta = {
        "files": {key: named(path) for key, path in files.items()},
        "yaml_files": {
            key: named(source) for key, source in zip(configs, sources, strict=True)
        },
        "timestamp": time.time(),
        "python": sys.version,
        "torch": str(torch.__version__),
        "espnet": espnet_version,
    }
    outpath.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="spear-pack-") as work:
        texts = {META: META, named(folder / CARD): CARD, named(folder / STAMP): STAMP}
        written = Path(work)
        (written / META).write_text(yaml.safe_dump(meta), encoding="utf-8")
        (written / CARD).write_text(card, encoding="utf-8")
        write_stamp(written / STAMP)
        for number, (source, (_, config)) in enumerate(
            zip(sources, configs.values(), strict=True)
        ):
            text = yaml.safe_dump(relocate(dict(config), names), allow_unicode=True)
            (written / f"{number}.yaml").write_text(text, encoding="utf-8")
            texts[named(source)] = f"{number}.yaml"
        # Not there by half: the archive gets its name when it is complete.
        partial = outpath.with_name(f".part.{outpath.name}")
        try:
            with Archiver(partial, mode="w") as archive:
                for name, text in texts.items():
                    archive.add(written / text, name)
                for path in {p.resolve() for p in (*files.values(), *options)}:
                    if named(path) not in texts:
                        archive.add(path, named(path))
            partial.replace(outpath)
        except ValueError as error:
            raise PackError(f"{outpath}: {error}; name it xxx.zip or xxx.tgz") from None
        finally:
            partial.unlink(missing_ok=True)


def _files_below(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())
