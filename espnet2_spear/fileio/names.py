"""Ids of utterances, and names of files that are called after them."""

from __future__ import annotations

import re
import unicodedata

from espnet2_spear.fileio.hashes import digest_of_parts

LONGEST = 200  # bytes of a file's name; file systems take 255, and we add some


def safe_id(text: str) -> str:
    """Return text with what does not belong into an utterance id replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.replace("/", "-"))


def one_word(text: str) -> str:
    """Return text as a key of tables: white space, and bytes that are no UTF-8, are _.

    Other letters stay, so that names of files in any script remain different.
    """
    return re.sub(r"[\s\udc80-\udcff]+", "_", text)


def file_name(utt: str, suffix: str) -> str:
    """Return the name of an utterance's file: the same for the same id everywhere.

    Ids that are too long get a hash, and those with capitals or composed letters, too:
    another id, even of another run, may differ in these only, and some file systems
    take both names for one.

    Args:
        utt: its id.
        suffix: with its dot.
    """
    raw = utt.encode("utf-8", "surrogateescape")
    plain = unicodedata.normalize("NFD", utt).casefold()
    if len(raw) + len(suffix) <= LONGEST and utt == plain:
        return utt + suffix
    return _hashed(raw, suffix)


def small_folder(utt: str) -> str:
    """Return one of 256 folders' names, which keep each of them small.

    The same for the same id everywhere.
    """
    return digest_of_parts([utt.encode("utf-8", "surrogateescape")])[:2]


def short_id(utt: str) -> str:
    """Return an id that is short enough to name files, the same for the same id."""
    raw = utt.encode("utf-8", "surrogateescape")
    return utt if len(raw) <= LONGEST else _hashed(raw, "")


def _hashed(raw: bytes, suffix: str) -> str:
    digest = digest_of_parts([raw])[:16]
    kept = raw[: LONGEST - len(suffix) - 17].decode("utf-8", "ignore")
    return f"{kept}-{digest}{suffix}"
