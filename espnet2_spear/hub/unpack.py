"""Unpack archives of unknown origin: nothing leaves the folder, nothing is left of a
refused one.

Every member is judged before it is written: plain files and folders inside the target
only, within limits on number, size and compression.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from espnet2_spear.hub.files import CheckpointError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2")
ARCHIVE_SUFFIXES += (".txz", ".tar.xz")
_COPY = 1 << 20  # bytes read at once
_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)
_ERRORS += (RuntimeError, NotImplementedError)  # encrypted, unknown compression


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


@dataclass(frozen=True)
class _Member:
    """A member before it is read: its name, kind, size, and how to open it."""

    name: str
    kind: str  # file, folder or what else it is
    size: int
    open: Any  # () -> binary file


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is packed, by its name."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


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
    limits = limits or Limits()
    if not archive.is_file():
        raise UnpackError(f"{archive}: no such file; name a packed model")
    if folder.exists() and any(folder.iterdir()):
        raise UnpackError(f"{folder}: is not empty; unpack {archive} into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _extract(archive, work, limits)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    folder.chmod(0o755)
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _extract(archive: Path, folder: Path, limits: Limits) -> None:
    """Write all members below a new, empty folder."""
    seen: set[str] = set()
    total = 0
    packed = archive.stat().st_size

    def judge_total(size: int) -> None:
        if size > limits.total_bytes:
            raise _refuse(
                archive,
                f"it unpacks to more than {limits.total_bytes} bytes",
                "if you trust it, unpack it by hand and name the folder",
            )
        if size > (64 << 20) and size > limits.ratio * packed:
            raise _refuse(
                archive,
                f"it unpacks to over {limits.ratio:g} times its size, as no weights do",
                "if you trust it, unpack it by hand and name the folder",
            )

    try:
        for member in _members(archive):
            name = _checked_name(archive, member.name)
            if member.kind not in ("file", "folder"):
                raise _refuse(archive, f"{member.name!r} is a {member.kind}")
            if member.kind == "file" and name in seen:
                raise _refuse(archive, f"{member.name!r} is in it twice")
            seen.add(name)
            if len(seen) > limits.members:
                raise _refuse(archive, f"it has more than {limits.members} members")
            judge_total(total + member.size)
            target = folder / name
            if member.kind == "folder":
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # "x": neither overwrites nor follows anything.
            with member.open() as source, target.open("xb") as sink:
                while block := source.read(_COPY):
                    total += len(block)  # headers may lie about sizes
                    judge_total(total)
                    sink.write(block)
    except UnpackError:
        raise
    except _ERRORS as error:
        raise UnpackError(
            f"{archive}: is corrupt or no {archive.suffix} archive ({error}); fetch it "
            "again"
        ) from error
    if not seen:
        raise UnpackError(f"{archive}: is empty; fetch it again")


def _members(archive: Path) -> Iterator[_Member]:
    """Yield members in their order, without reading ahead."""
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                yield _Member(
                    info.filename, _zip_kind(info), info.file_size, _opener(file, info)
                )
        return
    with tarfile.open(archive, mode="r:*") as file:
        for info in file:
            kind = "file" if info.isreg() else "folder" if info.isdir() else "link"
            if info.isdev():
                kind = "device"
            yield _Member(info.name, kind, info.size, _opener(file, info))
        if file.fileobj is not None:
            file.fileobj.read(_COPY)  # to the end, where the check sums are


def _opener(file: zipfile.ZipFile | tarfile.TarFile, info: Any) -> Any:
    def open_member() -> IO[bytes]:
        if isinstance(file, zipfile.ZipFile):
            return file.open(info)
        source = file.extractfile(info)
        if source is None:
            raise tarfile.ReadError(f"{info.name} has no content")
        return source

    return open_member


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "link"
    if info.is_dir():
        return "folder"
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "device"


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
