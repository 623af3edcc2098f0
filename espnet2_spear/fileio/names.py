"""Names of files that are called after an utterance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

LONGEST = 200  # bytes of a file's name; file systems take 255, and we add some


def file_name(utt: str, suffix: str, hashed: bool = False) -> str:
    """Return the name of an utterance's file: the same for the same id everywhere.

    Args:
        utt: its id.
        suffix: with its dot.
        hashed: add a hash of the id, because another id differs only by case (some
            file systems take both names for one). Ids that are too long get it anyway.
    """
    raw = utt.encode("utf-8", "surrogateescape")
    if len(raw) + len(suffix) <= LONGEST and not hashed:
        return utt + suffix
    digest = hashlib.sha256(raw).hexdigest()[:16]
    kept = raw[: LONGEST - len(suffix) - 17].decode("utf-8", "ignore")
    return f"{kept}-{digest}{suffix}"


def differ_by_case(utts: Iterable[str]) -> set[str]:
    """Return the ids that differ from another one only by case."""
    first: dict[str, str] = {}
    found: set[str] = set()
    for utt in utts:
        other = first.setdefault(utt.casefold(), utt)
        if other != utt:
            found |= {other, utt}
    return found
