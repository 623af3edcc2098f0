"""Packed models of unknown origin: unpacked safely, checked, described.

A packed model is an archive with ``meta.yaml``, as ESPnet's ``pack`` writes it; those
of the plugin also carry a stamp with the number of their format. Every member is judged
before it is written: plain files and folders inside the target only, within limits on
number, size and compression (ESPnet unpacks without limits, and before 202611 without
looking at names). The weights are read as tensors once, so that a pickle with code in
it is refused here and not executed later.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import yaml

from espnet2_spear import __version__
from espnet2_spear.errors import CheckpointError

META = "meta.yaml"
STAMP = "spear_plugin.yaml"
FORMAT = 1  # grows when older versions of the plugin could not open a model any more
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2")
ARCHIVE_SUFFIXES += (".txz", ".tar.xz")
_BLOCK = 1 << 20  # bytes read at once
_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)
_ERRORS += (RuntimeError, NotImplementedError)  # encrypted, unknown compression
_BY_HAND = "if you trust it, unpack it by hand and name the folder"


class UnpackError(CheckpointError):
    """An archive that is corrupt, unsafe or too new; names the file and the remedy."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Attributes:
        members: files and folders.
        total_bytes: of all files, unpacked.
        ratio: unpacked bytes by packed bytes; counts beyond 64 MiB only, because small
            files of text may be packed well.
    """

    members: int = 10_000
    total_bytes: int = 32 << 30
    ratio: float = 100.0


# --- Archives -------------------------------------------------------------------------


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is packed, by its name."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether this is a packed model, or a folder that one was unpacked into."""
    path = Path(path)
    return (path / META).is_file() or (path.is_file() and is_archive(path))


def unpack(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    limits: Limits | None = None,
) -> list[Path]:
    """Unpack any archive safely.

    Args:
        archive: zip, tar, or tar packed by gzip, bzip2 or xz.
        folder: must not exist yet or be empty; it appears whole or not at all.
        limits: the default ones if None.

    Returns:
        the files, sorted.

    Raises:
        UnpackError: no such file, corrupt, a member that is no plain file or folder or
            that would leave ``folder``, or a limit exceeded. Nothing is left then.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise UnpackError(f"{archive}: no such file; name a packed model")
    if folder.exists() and any(folder.iterdir()):
        raise UnpackError(f"{folder}: is not empty; unpack {archive} into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _extract(archive, work, limits or Limits())
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    except _ERRORS as error:
        shutil.rmtree(work, ignore_errors=True)
        raise UnpackError(
            f"{archive}: is corrupt or no {archive.suffix} archive ({error}); fetch it "
            "again"
        ) from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    folder.chmod(0o755)
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _extract(archive: Path, folder: Path, limits: Limits) -> None:
    """Write all members below a new, empty folder."""
    seen: set[str] = set()
    total, packed = 0, archive.stat().st_size

    def judge_total(size: int) -> None:
        if size > limits.total_bytes:
            text = f"it unpacks to more than {limits.total_bytes} bytes"
            raise _refuse(archive, text, _BY_HAND)
        if size > max(64 << 20, limits.ratio * packed):
            text = f"it unpacks to over {limits.ratio:g} times its size, as no weights"
            raise _refuse(archive, f"{text} do", _BY_HAND)

    for name, kind, size, open_member in _members(archive):
        path = _checked_name(archive, name)
        if kind not in ("file", "folder"):
            raise _refuse(archive, f"{name!r} is a {kind}")
        if kind == "file" and path in seen:
            raise _refuse(archive, f"{name!r} is in it twice")
        seen.add(path)
        if len(seen) > limits.members:
            raise _refuse(archive, f"it has more than {limits.members} members")
        judge_total(total + size)
        target = folder / path
        if kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        # "x": neither overwrites nor follows anything.
        with open_member() as source, target.open("xb") as sink:
            while block := source.read(_BLOCK):
                total += len(block)  # headers may lie about sizes
                judge_total(total)
                sink.write(block)
    if not seen:
        raise UnpackError(f"{archive}: is empty; fetch it again")


def _members(
    archive: Path,
) -> Iterator[tuple[str, str, int, Callable[[], IO[bytes]]]]:
    """Yield name, kind, size and opener of the members, without reading ahead."""
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
        if file.fileobj is not None:
            file.fileobj.read(_BLOCK)  # to the end, where the check sums are


def _checked_name(archive: Path, name: str) -> str:
    """Return a member's name as a relative path inside the folder."""
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    if unsafe or name[1:2] == ":" or len(name) > 1024:
        raise _refuse(archive, f"{name[:80]!r} would be written outside its folder")
    return str(path)


def _refuse(archive: Path, what: str, remedy: str = "") -> UnpackError:
    remedy = remedy or "it was not made by ESPnet's pack: do not use it"
    return UnpackError(f"{archive}: refused, because {what}; {remedy}")


# --- Models in them -------------------------------------------------------------------


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
        yaml_files, weights = model_files(archive, folder)
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


def model_files(archive: Path, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Read ``meta.yaml`` of an unpacked model: configurations, and other files.

    Raises:
        UnpackError: it is missing or malformed, or names a file that is not there.
    """
    meta = read_yaml(archive, folder / META)
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


def read_yaml(archive: Path, path: Path) -> dict[str, Any]:
    """Read a table of an unpacked model.

    Raises:
        UnpackError: it is missing or no table.
    """
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
        content = moved(read_yaml(archive, path))
    except RecursionError as error:  # an alias of YAML may hold itself
        raise UnpackError(
            f"{archive}: {path.name} never ends; do not use it"
        ) from error
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


# --- The plugin's stamp ---------------------------------------------------------------


def write_stamp(path: Path) -> Path:
    """Write what :func:`check_stamp` reads; returns the path."""
    content = {"spear_format": FORMAT, "espnet2_spear": __version__}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


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


def _read_stamp(archive: Path, path: Path) -> dict[str, Any]:
    stamp = read_yaml(archive, path)
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
    """What a packed model, or the folder of an unpacked one, is.

    Returns:
        facts, and the files that its configurations name but it does not hold: name ->
        which option of which configuration names it.

    Raises:
        UnpackError: as :func:`unpack_model`.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="spear-") as work:
        folder = path if path.is_dir() else Path(work) / "model"
        if not path.is_dir():
            unpack_model(path, folder)
        configs, weights = model_files(path, folder)
        stamp = check_stamp(path, folder)
        facts = {"arguments": ", ".join([*configs, *weights])}
        made_by = stamp.get("espnet2_spear", "no version of the plugin (no stamp)")
        facts["packed by"] = f"espnet2-spear {made_by}" if stamp else made_by
        lacking = {}
        for name, file in configs.items():
            config = read_yaml(path, file)
            for key in ("frontend", "encoder", "student"):
                if isinstance(config.get(key), str):
                    facts[f"{name}.{key}"] = config[key]
            for key, value in named_files(config).items():
                if not Path(value).is_relative_to(folder) or not Path(value).exists():
                    lacking[value] = f"{name}: {key}"
        return facts, lacking
