"""Packed models of unknown origin: unpacked safely, checked, described.

A packed model is an archive with ``meta.yaml``, as ESPnet's ``pack`` writes it; those
of the plugin also carry a stamp with the number of their format. Every member is judged
before it is written: plain files and folders inside the target only, within limits on
number, size and compression (ESPnet unpacks without limits, and before 202611 without
looking at names). The weights are read as tensors once, so that a pickle with code in
it is refused here and not executed later.
"""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import yaml

from espnet2_spear import __version__
from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.explain import FULL
from espnet2_spear.hub.tensors import read_settings, read_tensors

META = "meta.yaml"
STAMP = "spear_plugin.yaml"
FORMAT = 1  # grows when older versions of the plugin could not open a model any more
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2")
ARCHIVE_SUFFIXES += (".txz", ".tar.xz")
# What an archive may hold, in bytes unpacked. The ratio to its own size counts beyond
# 64 MiB only, because small files of text may be packed well.
MAX_MEMBERS, MAX_BYTES = 10_000, 32 << 30
MAX_RATIO, RATIO_BEYOND = 100, 64 << 20
_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
_ERRORS += (EOFError, OSError)
_OF_DISK = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS)
_ERRORS += (RuntimeError, NotImplementedError)  # encrypted, unknown compression


# --- Archives -------------------------------------------------------------------------


def is_unpacked(path: Path) -> bool:
    """Whether this is a folder that a model was unpacked into."""
    return (path / META).is_file()


def is_packed(path: Path) -> bool:
    """Whether this is a packed model, by its name, or an unpacked one."""
    archive = path.name.lower().endswith(ARCHIVE_SUFFIXES)
    return is_unpacked(path) or (archive and path.is_file())


def unpack(archive: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Unpack any archive safely.

    Args:
        archive: zip, tar, or tar packed by gzip, bzip2 or xz.
        folder: must not exist yet or be empty; it appears whole or not at all.

    Raises:
        CheckpointError: no such file, corrupt, a member that is no plain file or folder
            or that would leave ``folder``, or a limit exceeded. Nothing is left then.
        OSError: a full or protected disk.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise CheckpointError(f"{archive}: no such file; name a packed model")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder}: is not empty; unpack {archive} into a new folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _extract(archive, work)
        work.chmod(0o755)
        work.replace(folder)
    except _ERRORS as error:
        if isinstance(error, OSError) and error.errno in _OF_DISK:
            raise
        raise CheckpointError(
            f"{archive}: is corrupt or no {archive.suffix} archive ({error}); fetch it "
            "again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    """Write all members below a new, empty folder."""
    seen: set[PurePosixPath] = set()
    total, most = 0, max(RATIO_BEYOND, MAX_RATIO * archive.stat().st_size)
    for name, kind, size, open_member in _members(archive):
        path = PurePosixPath(name)
        outside = path.is_absolute() or ".." in path.parts or {*"\\\0"} & {*name}
        total += size
        for wrong, what in (
            (
                outside or name[1:2] == ":" or len(name) > 1024,
                f"{name[:80]!r} would be written outside its folder",
            ),
            (kind not in ("file", "folder"), f"{name!r} is a {kind}"),
            (kind == "file" and path in seen, f"{name!r} is in it twice"),
            (len(seen) >= MAX_MEMBERS, f"it has more than {MAX_MEMBERS} members"),
            (total > MAX_BYTES, f"it unpacks to more than {MAX_BYTES} bytes"),
            (total > most, f"it unpacks to over {MAX_RATIO} times its size"),
        ):
            if wrong:
                raise CheckpointError(
                    f"{archive}: refused, because {what}, as no model does; do not use "
                    "it, or if you trust it, unpack it by hand and name the folder"
                )
        seen.add(path)
        target = folder / path
        if kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        # "x": neither overwrites nor follows anything.
        with open_member() as source, target.open("xb") as sink:
            shutil.copyfileobj(source, sink)
    if not seen:
        raise CheckpointError(f"{archive}: is empty; fetch it again")


def _members(
    archive: Path,
) -> Iterator[tuple[str, str, int, Callable[[], IO[bytes]]]]:
    """Yield name, kind, size and opener of the members, without reading ahead.

    Sizes are true: reading fails where a zip's headers lie, and ends there in a tar.
    """
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)
                kind = "folder" if info.is_dir() else "file"
                if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                    kind = "link" if mode == stat.S_IFLNK else "device"
                yield info.filename, kind, info.file_size, lambda i=info: file.open(i)
        return
    with tarfile.open(archive, mode="r:*") as file:
        for info in file:
            kind = "file" if info.isreg() else "folder" if info.isdir() else "link"
            kind = "device" if info.isdev() else kind
            yield info.name, kind, info.size, lambda i=info: file.extractfile(i)
        file.fileobj.read(1 << 20)  # to the end, where the check sums are


# --- Models in them -------------------------------------------------------------------


class Packed(NamedTuple):
    """Description of an unpacked model.

    Attributes:
        configs: argument of ESPnet's inference class -> configuration.
        weights: the same for other files.
        stamp: of the plugin, empty if it has none.
    """

    configs: dict[str, Path]
    weights: dict[str, Path]
    stamp: dict[str, Any]


def read_packed(archive: Path, folder: Path) -> Packed:
    """Read ``meta.yaml`` and the stamp of an unpacked model.

    Args:
        archive: what messages name.
        folder: that it was unpacked into; in it, or a folder of it, is the stamp.

    Raises:
        CheckpointError: the model is of a format newer than this version knows, or its
            ``meta.yaml`` is missing or malformed, or names a file that is not there.
    """
    stamps = sorted(folder.rglob(STAMP))
    stamp = read_stamp(archive, stamps[0]) if stamps else {}
    meta = read_yaml_table(archive, folder / META)
    found: dict[str, dict[str, Path]] = {"yaml_files": {}, "files": {}}
    for key, paths in found.items():
        if not isinstance(meta.get(key), dict):
            raise CheckpointError(f"{archive}: {META} has no table '{key}'; pack again")
        for name, value in meta[key].items():
            # pack() of files outside its working directory names them absolutely,
            # while the archive has no leading slash.
            paths[str(name)] = path = folder / str(value).lstrip("/")
            if ".." in path.relative_to(folder).parts or not path.is_file():
                raise CheckpointError(
                    f"{archive}: {META} names {value}, which is not in it; pack again"
                )
    return Packed(found["yaml_files"], found["files"], stamp)


def unpack_model(
    archive: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> dict[str, str]:
    """Unpack a packed model, check it and return what ESPnet's inference wants.

    As ``espnet2.main_funcs.pack_funcs.unpack``: keys such as ``asr_train_config`` and
    ``asr_model_file`` with the files' new paths, which also replace the old ones within
    the configurations.

    Raises:
        CheckpointError: as :func:`unpack` and :func:`read_packed`, or weights that are
            not only tensors.
    """
    archive, folder = Path(archive), Path(folder)
    unpack(archive, folder)
    try:
        packed = read_packed(archive, folder)
        files = [p for p in folder.rglob("*") if p.is_file()]
        names = {p.relative_to(folder).as_posix() for p in files}

        def unpacked(text: str) -> str:
            name = text.lstrip("/")
            return str(folder / name) if "/" in text and name in names else text

        for path in packed.configs.values():
            content = with_texts(read_yaml_table(archive, path), unpacked, archive)
            text = yaml.safe_dump(content, allow_unicode=True)
            path.write_text(text, encoding="utf-8")
        check_only_tensors(archive, packed)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {k: str(v) for k, v in (packed.configs | packed.weights).items()}


def check_only_tensors(archive: Path, packed: Packed) -> None:
    """Read weights as tensors, which executes nothing.

    Raises:
        CheckpointError: they hold something else; ESPnet 202511 would execute it.
    """
    for path in packed.weights.values():
        try:
            read_tensors(path)
        except CheckpointError as error:
            raise CheckpointError(f"{archive}: {error}") from error


def read_yaml_table(archive: Path, path: Path) -> dict[str, Any]:
    """Read a table of an unpacked model.

    Raises:
        CheckpointError: it is missing or no table.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{archive}: holds no {path.name}; it is cut off, or no packed model "
            "(spear_pack and ESPnet's pack write one)"
        )
    content = read_settings(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{archive}: {path.name} holds no table; pack it again")
    return content


def with_texts(config: Any, change: Callable[[str], str], name: Path) -> Any:
    """Return what YAML holds with all texts in it changed.

    Raises:
        CheckpointError: an alias holds itself; it begins with ``name``.
    """
    known: dict[int, Any] = {}  # aliases are the same object: visited once

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict | list) and id(value) not in known:
            if isinstance(value, dict):
                known[id(value)] = {k: changed(v) for k, v in value.items()}
            else:
                known[id(value)] = [changed(v) for v in value]
        return known.get(id(value), value)

    try:
        return changed(config)
    except RecursionError as error:
        raise CheckpointError(
            f"{name}: a configuration that never ends; do not use it"
        ) from error


# --- The plugin's stamp ---------------------------------------------------------------


def read_stamp(archive: Path, path: Path) -> dict[str, Any]:
    """Read the plugin's stamp of a model.

    Args:
        archive: what messages name.
        path: of the stamp.

    Raises:
        CheckpointError: the model is of a format newer than this version knows.
    """
    stamp = read_yaml_table(archive, path)
    made_by = stamp.get("espnet2_spear")
    check_format(stamp.get("spear_format"), f"{archive}: {STAMP}: it", made_by)
    return stamp


def check_format(number: Any, where: str, made_by: Any = None) -> None:
    """Refuse a model of a newer format.

    Args:
        number: ``spear_format`` as the model says.
        where: what to name.
        made_by: version of the plugin that wrote it, if known.

    Raises:
        CheckpointError: it is no number, or a newer one than :data:`FORMAT`.
    """
    if not isinstance(number, int):
        raise CheckpointError(f"{where} says no number as spear_format; pack it again")
    if number > FORMAT:
        author = f"espnet2-spear {made_by or 'that is newer'}"
        raise CheckpointError(
            f"{where} was packed by {author} in format {number}; this is "
            f"espnet2-spear {__version__}, which knows up to format {FORMAT}: "
            "pip install --upgrade espnet2-spear"
        )


# --- What a configuration needs -------------------------------------------------------


def named_files(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Files that a task's configuration names and inference reads: key -> name.

    The token list is one only before training; afterwards it is in the configuration.
    A student's checkpoint is needed unless ``arch`` is there, too.
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_conf"):
            found |= named_files(value, f"{key}.")
        elif not isinstance(value, str) or (not prefix and key.endswith("_file")):
            continue  # at the top level: shapes of training utterances and the like
        elif key.endswith(("bpemodel", "token_list", "_file")) or (
            key == "ckpt" and config.get("arch") is None
        ):
            found[prefix + key] = value
    return found


def describe(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Describe a packed model, or the folder of an unpacked one.

    Returns:
        facts, and the files that its configurations name but it does not hold: name ->
        which option of which configuration names it.

    Raises:
        CheckpointError: as :func:`unpack_model`.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="spear-") as work:
        folder = path if path.is_dir() else Path(work) / "model"
        if folder != path:
            unpack_model(path, folder)
        packed = read_packed(path, folder)
        made_by = packed.stamp.get("espnet2_spear", "unknown version (no stamp)")
        facts = {"arguments": ", ".join([*packed.configs, *packed.weights])}
        facts["packed by"] = f"espnet2-spear {made_by}"
        lacking = {}
        for name, file in packed.configs.items():
            config = read_yaml_table(path, file)
            for key in ("frontend", "encoder", "student"):
                if isinstance(config.get(key), str):
                    facts[f"{name}.{key}"] = config[key]
            for key, value in named_files(config).items():
                if not Path(value).is_relative_to(folder) or not Path(value).exists():
                    lacking[value] = f"{name}: {key}"
        return facts, lacking
