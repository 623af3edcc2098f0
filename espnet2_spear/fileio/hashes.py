"""Hashes: files known again by their content, runs by their facts, names by numbers."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from typing import Any

BLOCK = 1 << 20


def crc32_of(path: str | os.PathLike[str]) -> int | None:
    """CRC-32 of a file's content, None if it cannot be read."""
    crc32 = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                crc32 = zlib.crc32(block, crc32)
    except OSError:
        return None
    return crc32


def hash_of(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Hash of a file's content in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.new(algorithm)  # Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(facts: Any) -> str:
    """SHA-256, as 64 hexadecimal digits, of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of_parts(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256, as 64 hexadecimal digits, of parts that are never together in memory."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def name_hash(name: str) -> int:
    """64 bits that stand for a name: the same in every process and version."""
    content = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
