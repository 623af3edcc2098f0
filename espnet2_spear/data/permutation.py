"""Random permutations that are computed element by element and never stored."""

from __future__ import annotations

import numpy as np

ROUNDS = 6


def hash64(*parts: np.ndarray | int) -> np.ndarray:
    """Mix whole numbers into 64 random bits, elementwise (splitmix64's finaliser).

    Args:
        parts: whole numbers, or arrays of them whose shapes fit together.

    Returns:
        uint64 of the common shape, at least one-dimensional.
    """
    value = np.zeros(1, np.uint64)
    for part in parts:
        # Arrays, because only they wrap around in silence.
        value = value * np.uint64(0x9E3779B97F4A7C15) + np.atleast_1d(part).astype(
            np.uint64
        )
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return value


def permuted(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Apply a keyed random permutation of 0..size-1 to ``index``, elementwise.

    A balanced Feistel network permutes the next power of four; results that are not
    below ``size`` are permuted again until they are (Black and Rogaway 2002), which
    makes it a permutation of 0..size-1 without any table.

    Args:
        index: (K,) in 0..size-1.
        size: (K,) at least 1.
        key: (K,) uint64; elements of one permutation share their key and size.

    Returns:
        int64 (K,).
    """
    size = np.asarray(size, np.int64)
    bits = np.frexp((size - 1).astype(np.float64))[1]
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    result = np.asarray(index).astype(np.uint64)
    limit, todo = size.astype(np.uint64), np.arange(len(result))
    while len(todo):
        value, width = result[todo], half[todo]
        mask = (np.uint64(1) << width) - np.uint64(1)
        left, right = value >> width, value & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (hash64(key[todo], number, right) & mask)
        result[todo] = (left << width) | right
        todo = todo[result[todo] >= limit[todo]]
    return result.astype(np.int64)
