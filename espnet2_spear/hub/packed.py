"""Packed models of unknown origin: what is in them, and whether it can be opened.

A packed model is an archive with ``meta.yaml``, as ESPnet's ``pack`` writes it; those
of the plugin also carry a stamp with the number of their format. The weights are read
as tensors once, so that a pickle with code in it is refused here and not executed
later.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear import __version__
from espnet2_spear.hub.files import CheckpointError
from espnet2_spear.hub.unpack import Limits, UnpackError, is_archive, unpack

META = "meta.yaml"
STAMP = "spear_plugin.yaml"
NEEDS = "needs the file"  # what a packed model lacks, among the facts of describe()
FORMAT = 1  # grows when older versions of the plugin could not open a model any more


def unpack_model(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    limits: Limits | None = None,
) -> dict[str, str]:
    """Unpack a packed model, check it and return what ESPnet's inference wants.

    As ``espnet2.main_funcs.pack_funcs.unpack``: keys such as ``asr_train_config`` and
    ``asr_model_file`` with the files' new paths, which also replace the old ones within
    the configurations.

    Raises:
        UnpackError: as :func:`unpack`, no packed model, made with a newer format, or
            weights that are not only tensors.
    """
    archive, folder = Path(archive), Path(folder)
    files = unpack(archive, folder, limits)
    try:
        yaml_files, weights = read_meta(archive, folder)
        check_stamp(archive, folder)
        names = {str(p.relative_to(folder)) for p in files}
        for path in yaml_files.values():
            _relocate(archive, path, folder, names)
        for path in weights.values():
            check_weights(archive, path)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {k: str(v) for k, v in {**yaml_files, **weights}.items()}


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether this is a packed model, or a folder that one was unpacked into."""
    path = Path(path)
    return (path / META).is_file() or (path.is_file() and is_archive(path))


@contextmanager
def opened_student(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the weights file of a packed student, its configuration beside it.

    An archive is unpacked into a folder that is gone when the context ends; a folder
    of an unpacked model is used as it is.

    Raises:
        UnpackError: as :func:`unpack_model`, or a model of another kind.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="spear-") as work:
        folder = path if path.is_dir() else Path(work) / "model"
        if path.is_file():
            unpack_model(path, folder)
        configs, weights = read_meta(path, folder)
        check_stamp(path, folder)
        ours = set(configs) == {"train_config"} and set(weights) == {"model_file"}
        if not ours or "student_conf" not in _read_yaml(path, configs["train_config"]):
            kinds = ", ".join([*configs, *weights])
            raise UnpackError(
                f"{path}: is no pre-trained student but a model of ESPnet ({kinds}); "
                "open it by the inference class of its task, after import espnet2_spear"
            )
        config, file = configs["train_config"], weights["model_file"]
        if config != file.with_name("config.yaml"):
            raise UnpackError(f"{path}: {config.name} is not beside {file.name}")
        try:
            yield file
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def describe(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a packed model, or the folder of an unpacked one, is and needs.

    Raises:
        UnpackError: as :func:`unpack_model`.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="spear-") as work:
        folder = path if path.is_dir() else Path(work) / "model"
        if not path.is_dir():
            unpack_model(path, folder)
        configs, weights = read_meta(path, folder)
        stamp = check_stamp(path, folder)
        facts = {"arguments": ", ".join([*configs, *weights])}
        made_by = stamp.get("espnet2_spear", "no version of the plugin (no stamp)")
        facts["packed by"] = f"espnet2-spear {made_by}" if stamp else made_by
        for name, file in configs.items():
            config = _read_yaml(path, file)
            for key in ("frontend", "encoder", "student"):
                if isinstance(config.get(key), str):
                    facts[f"{name}.{key}"] = config[key]
            conf = config.get("frontend_conf") or {}
            if conf.get("ckpt") and not conf.get("arch"):
                facts[NEEDS] = str(conf["ckpt"])
        return facts


def read_meta(archive: Path, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Read ``meta.yaml`` of an unpacked model: configurations, and other files.

    Raises:
        UnpackError: it is missing or malformed, or names a file that is not there.
    """
    meta = _read_yaml(archive, folder / META)
    found: list[dict[str, Path]] = []
    for key in ("yaml_files", "files"):
        table = meta.get(key)
        if not isinstance(table, dict):
            raise UnpackError(f"{archive}: {META} has no table '{key}'; pack it again")
        paths = {}
        for name, value in table.items():
            # pack() of files outside its working directory names them absolutely,
            # while the archive has no leading slash.
            path = folder / str(value).lstrip("/")
            if ".." in Path(str(value)).parts or not path.is_file():
                raise UnpackError(
                    f"{archive}: {META} names {value}, which is not in it; pack again"
                )
            paths[str(name)] = path
        found.append(paths)
    return found[0], found[1]


def check_stamp(archive: Path, folder: Path) -> dict[str, Any]:
    """Return the plugin's stamp of an unpacked model, empty if it has none.

    Args:
        archive: what messages name.
        folder: in which, or in a folder of which, the stamp is.

    Raises:
        UnpackError: the model is of a format newer than this version knows.
    """
    stamps = sorted(folder.rglob(STAMP))
    return _read_stamp(archive, stamps[0]) if stamps else {}


def check_stamp_beside(weights: Path) -> None:
    """See that a file of weights can be opened, if a stamp lies beside it.

    Raises:
        UnpackError: as of :func:`check_stamp`.
    """
    stamp = weights.with_name(STAMP)
    if stamp.is_file():
        _read_stamp(weights, stamp)


def check_format(number: Any, where: str, made_by: Any = None) -> None:
    """Refuse a model of a newer format.

    Args:
        number: ``spear_format`` as the model says.
        where: what to name.
        made_by: version of the plugin that wrote it, if known.

    Raises:
        UnpackError: it is no number, or a newer one than :data:`FORMAT`.
    """
    if not isinstance(number, int):
        raise UnpackError(f"{where} says no number as spear_format; pack it again")
    if number > FORMAT:
        author = (
            "a newer espnet2-spear" if made_by is None else f"espnet2-spear {made_by}"
        )
        raise UnpackError(
            f"{where} was packed by {author} in format {number}; this is "
            f"espnet2-spear {__version__}, which knows up to format {FORMAT}: "
            "pip install --upgrade espnet2-spear"
        )


def _read_stamp(archive: Path, path: Path) -> dict[str, Any]:
    stamp = _read_yaml(archive, path)
    made_by = stamp.get("espnet2_spear")
    check_format(stamp.get("spear_format"), f"{archive}: {STAMP}: it", made_by)
    return stamp


def write_stamp(path: Path) -> Path:
    """Write what :func:`check_stamp` reads; returns the path."""
    content = {"spear_format": FORMAT, "espnet2_spear": __version__}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def check_weights(archive: Path, path: Path) -> None:
    """Read weights as tensors, which executes nothing; safetensors hold nothing else.

    Raises:
        UnpackError: it holds something else; ESPnet 202511 would have executed it.
    """
    if path.suffix == ".safetensors":
        return
    import torch

    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UnpackError(
            f"{archive}: {path.name} is damaged or holds more than tensors ({first}); "
            "do not load it, and ask who packed it for the weights alone"
        ) from error


def _read_yaml(archive: Path, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnpackError(
            f"{archive}: holds no {path.name}; it is cut off, or no packed model "
            "(spear_pack and ESPnet's pack write one)"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UnpackError(f"{archive}: {path.name} is no YAML ({error})") from error
    if not isinstance(content, dict):
        raise UnpackError(f"{archive}: {path.name} holds no table; pack it again")
    return content


def _relocate(archive: Path, path: Path, folder: Path, names: set[str]) -> None:
    """Let a configuration name packed files by where they are now."""

    known: dict[int, Any] = {}  # aliases of YAML are the same object: visited once

    def moved(value: Any) -> Any:
        if isinstance(value, str) and "/" in value and value.lstrip("/") in names:
            return str(folder / value.lstrip("/"))
        if isinstance(value, dict | list) and id(value) not in known:
            if isinstance(value, dict):
                known[id(value)] = {k: moved(v) for k, v in value.items()}
            else:
                known[id(value)] = [moved(v) for v in value]
        return known.get(id(value), value)

    try:
        content = moved(_read_yaml(archive, path))
    except RecursionError as error:  # an alias of YAML may hold itself
        raise UnpackError(
            f"{archive}: {path.name} never ends; do not use it"
        ) from error
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
