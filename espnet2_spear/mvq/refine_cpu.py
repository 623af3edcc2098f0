"""The joint search of :mod:`.refine` on a CPU, compiled, one vector after the other.

All passes of a vector are made before the next one's, so that scores, candidates and
the products of candidates stay in the processor's nearest caches; as operations on
tensors, every intermediate result of a whole batch passes through memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

MIN_VECTORS = 64  # for each thread


def _compiled(function: Callable) -> Callable:
    """Compile at the first call, without Python's lock; keep the result on disk."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder can be written: compile in every process
        return numba.njit(function, **options)


def run_passes(
    products: np.ndarray,
    linear: np.ndarray,
    rows: np.ndarray,
    order: np.ndarray,
    kept: np.ndarray,
    iters: int,
    num_threads: int,
) -> None:
    """Refine the rows of many vectors in place.

    Args:
        products: (N*K, N*K) inner products of the centres, 0 within a codebook.
        linear: (B, N*K), part of the squared error that is a sum over codebooks.
        rows: (B, N) int64 rows of the table, one per codebook, in this order:
        order: (N,) int64 codebooks as they are paired.
        kept: (1 + log2 N,) int64 candidates kept per group of 1, 2, 4... codebooks.
        iters: passes; a vector that a pass leaves as it was takes no more.
        num_threads: threads, each with its share of the vectors.
    """
    num_threads = max(1, min(num_threads, len(rows) // MIN_VECTORS))
    shares = list(
        zip(
            np.array_split(linear, num_threads),
            np.array_split(rows, num_threads),
            strict=True,
        )
    )
    with ThreadPoolExecutor(num_threads) as pool:
        others = [
            pool.submit(_refine_all, products, *share, order, kept, iters)
            for share in shares[1:]
        ]
        _refine_all(products, *shares[0], order, kept, iters)
        for job in others:
            job.result()


@_compiled
def _refine_all(products, linear, rows, order, kept, iters):
    """As :func:`run_passes`, in one thread."""
    num = rows.shape[1]
    width = num * (kept[0] + 1)  # centres in use at most
    most = kept.max()
    scores = np.empty(len(products), products.dtype)
    new = np.empty(num, np.int64)
    # Of each group of codebooks: its centres in use, its candidates as positions
    # among these (the present choice first) and their scores; read and written in
    # turns.
    centers = np.empty((2, num, width), np.int64)
    widths = np.empty((2, num), np.int64)
    members = np.empty((2, num, most + 1, num), np.int64)
    values = np.empty((2, num, most), products.dtype)
    block = np.empty((width, width), products.dtype)
    partial = np.empty((most + 1, width), products.dtype)
    turned = np.empty((width, most + 1), products.dtype)
    cross = np.empty((most + 1, most + 1), products.dtype)
    joint = np.empty(most * most, products.dtype)
    best = np.empty(most, np.int64)
    pool = np.empty(max(most * most, width, len(products) // num), np.int64)
    bounds = np.empty(most, products.dtype)
    for b in range(len(rows)):
        current = rows[b]
        scores[:] = linear[b]
        for n in range(0, num - 1, 2):  # a single codebook has no products
            _add_twice(scores, products[current[n]], products[current[n + 1]])
        for i in range(iters):
            _take_candidates(
                scores, current, order, kept[0], centers, widths, members, values,
                best, pool, bounds,
            )  # fmt: skip
            _join_all(
                products, kept, new, centers, widths, members, values,
                block, partial, turned, cross, joint, best, pool, bounds,
            )  # fmt: skip
            moved = False
            for n in range(num):
                if new[n] != current[n]:
                    moved = True
                    if i < iters - 1:
                        _move(scores, products[new[n]], products[current[n]])
                    current[n] = new[n]
            if not moved:
                break


@_compiled
def _add_twice(scores, row, other):
    for i in range(len(scores)):
        product = row[i] + other[i]
        scores[i] += product + product


@_compiled
def _move(scores, new, old):
    for i in range(len(scores)):
        change = new[i] - old[i]
        scores[i] += change + change


@_compiled
def _take_candidates(
    scores, current, order, count, centers, widths, members, values, best, pool, bounds
):
    """The best centres of every codebook, each codebook a group of its own."""
    num = len(order)
    size = len(scores) // num
    for g in range(num):
        first = order[g] * size
        own = scores[first : first + size]
        _smallest(own, count, best, pool, bounds)
        centers[0, g, 0] = current[g]
        members[0, g, 0, 0] = 0
        widths[0, g] = count + 1
        for c in range(count):
            centers[0, g, c + 1] = first + best[c]
            members[0, g, c + 1, 0] = c + 1
            values[0, g, c] = own[best[c]]


@_compiled
def _smallest(values, count, best, pool, bounds):
    """Positions of the ``count`` smallest of the values, in any order, into best.

    Both numbers are powers of two.
    """
    total = len(values)
    if count == total:
        for c in range(count):
            best[c] = c
        return
    if count == 1:
        where = 0
        for i in range(total):
            if values[i] < values[where]:
                where = i
        best[0] = where
        return
    # The largest of ``count`` minima of disjoint parts bounds the wanted values.
    for c in range(count):
        bounds[c] = values[c]
    for start in range(count, total, count):
        for c in range(count):
            value = values[start + c]
            bounds[c] = value if value < bounds[c] else bounds[c]
    bound = bounds[0]
    for c in range(1, count):
        bound = bounds[c] if bounds[c] > bound else bound
    found = 0
    for i in range(total):
        pool[found] = i
        found += values[i] <= bound
    # The first ``count``, sorted, then each of the others that is better.
    taken = 0
    for p in range(found):
        value = values[pool[p]]
        if taken == count:
            if value >= bounds[count - 1]:
                continue
            place = count - 1
        else:
            place = taken
            taken += 1
        while place > 0 and bounds[place - 1] > value:
            bounds[place] = bounds[place - 1]
            best[place] = best[place - 1]
            place -= 1
        bounds[place] = value
        best[place] = pool[p]
    for place in range(taken, count):  # only after NaN, which compares with nothing
        best[place] = place


@_compiled
def _join_all(
    products, kept, new, centers, widths, members, values, block,
    partial, turned, cross, joint, best, pool, bounds,
):  # fmt: skip
    """Join groups pair by pair into one; its best candidate goes into new."""
    num = len(new)
    joined, level, old = 1, 0, kept[0]
    source = 0
    if num == 1:
        new[0] = centers[0, 0, 1]
        return
    while joined < num:
        level += 1
        count = kept[level]
        for g in range(num // (2 * joined)):
            left, right = 2 * g, 2 * g + 1
            _cross_products(
                products, centers[source], widths[source], members[source], left, old,
                joined, block, partial, turned, cross,
            )  # fmt: skip
            # d_a.d_b of the changes d, up to a constant, is a.b - a.b' - a'.b, with a'
            # and b' the present choice.
            for j in range(old):
                of_right = cross[j + 1, 0]
                of_right = values[source, right, j] - of_right - of_right
                for i in range(old):
                    product = cross[j + 1, i + 1] - cross[0, i + 1]
                    joint[j * old + i] = (
                        values[source, left, i] + of_right + product + product
                    )
            _smallest(joint[: old * old], count, best, pool, bounds)
            if 2 * joined == num:
                for n in range(joined):
                    place = members[source, left, best[0] % old + 1, n]
                    new[n] = centers[source, left, place]
                    place = members[source, right, best[0] // old + 1, n]
                    new[joined + n] = centers[source, right, place]
                return
            target = 1 - source
            start = widths[source, left]
            for n in range(joined):
                members[target, g, 0, n] = members[source, left, 0, n]
                members[target, g, 0, joined + n] = start + members[source, right, 0, n]
            for c in range(count):
                values[target, g, c] = joint[best[c]]
                i, j = best[c] % old + 1, best[c] // old + 1
                for n in range(joined):
                    members[target, g, c + 1, n] = members[source, left, i, n]
                    members[target, g, c + 1, joined + n] = (
                        start + members[source, right, j, n]
                    )
            _drop_unused(
                centers, widths, members[target, g], source, g, count, 2 * joined, pool
            )
        joined *= 2
        old = count
        source = 1 - source


@_compiled
def _cross_products(
    products, centers, widths, members, left, count, joined, block, partial, turned,
    cross,
):  # fmt: skip
    """cross[j, i]: products of candidate i of group left and j of the one after it."""
    right = left + 1
    width, span = widths[left], widths[right]
    if joined == 1:
        for i in range(width):
            row = products[centers[left, i]]
            for j in range(span):
                cross[j, i] = row[centers[right, j]]
        return
    for p in range(width):
        row = products[centers[left, p]]
        for q in range(span):
            block[p, q] = row[centers[right, q]]
    for i in range(count + 1):
        member = members[left, i]
        for q in range(span):
            partial[i, q] = block[member[0], q]
        for n in range(1, joined):
            of_center = block[member[n]]
            for q in range(span):
                partial[i, q] += of_center[q]
    for q in range(span):
        for i in range(count + 1):
            turned[q, i] = partial[i, q]
    for j in range(count + 1):
        member = members[right, j]
        for i in range(count + 1):
            cross[j, i] = turned[member[0], i]
        for n in range(1, joined):
            of_center = turned[member[n]]
            for i in range(count + 1):
                cross[j, i] += of_center[i]


@_compiled
def _drop_unused(centers, widths, members, source, group, count, joined, place):
    """Centres of a new group: those of its halves that some candidate uses."""
    target = 1 - source
    start = widths[source, 2 * group]
    width = start + widths[source, 2 * group + 1]
    place[:width] = -1
    kept = 0
    for c in range(count + 1):
        for n in range(joined):
            old = members[c, n]
            if place[old] < 0:
                place[old] = kept
                if old < start:
                    centers[target, group, kept] = centers[source, 2 * group, old]
                else:
                    old -= start
                    centers[target, group, kept] = centers[source, 2 * group + 1, old]
                kept += 1
            members[c, n] = place[members[c, n]]
    widths[target, group] = kept
