"""The joint search of :mod:`.search` on a CPU, compiled, one vector after the other.

All passes of a vector are made before the next one's, so that scores, candidates and
the products of candidates stay in the processor's nearest caches; as operations on
tensors, every intermediate result of a whole batch passes through memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy import ndarray

MIN_VECTORS = 64  # for each thread


def _compiled(function: Callable) -> Callable:
    """Compile at the first call, without Python's lock; keep the result on disk."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder can be written: compile in every process
        return numba.njit(function, **options)


def run_passes(
    products: ndarray,
    linear: ndarray,
    rows: ndarray,
    order: ndarray,
    kept: ndarray,
    iters: int,
    num_threads: int,
) -> None:
    """Refine the rows of many vectors in place.

    Args:
        products: (N*K, N*K) inner products of the centres, 0 within a codebook.
        linear: (B, N*K), part of the squared error that is a sum over codebooks.
        rows: (B, N) int64 rows of the table, codebooks as they are paired.
        order: (N,) int64 which codebook each of them is.
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


class Work(NamedTuple):
    """Memory of one thread; all but the tables is written before it is read.

    The candidates of groups of codebooks are those of one level and of the next.

    Attributes:
        products, order, kept: see :func:`run_passes`.
        centers: (2, N, centres) of each group, rows of the table.
        widths: (2, N) how many these are.
        members: (2, N, 1 + candidates, N) centres of a candidate, as positions among
            those of its group; the present choice comes first.
        scores: (2, N, candidates).
        block: (centres, centres) products of the centres of two groups.
        partial, turned: the same, summed over the centres of the candidates of one.
        cross: (1 + candidates, 1 + candidates) of the right and of the left group.
        joint: scores of all pairs of candidates.
        best: positions of chosen candidates.
        pool: positions of those that may be chosen.
        bounds: scores that they have to beat.
    """

    products: ndarray
    order: ndarray
    kept: ndarray
    centers: ndarray
    widths: ndarray
    members: ndarray
    scores: ndarray
    block: ndarray
    partial: ndarray
    turned: ndarray
    cross: ndarray
    joint: ndarray
    best: ndarray
    pool: ndarray
    bounds: ndarray


@_compiled
def _refine_all(
    products: ndarray,
    linear: ndarray,
    rows: ndarray,
    order: ndarray,
    kept: ndarray,
    iters: int,
) -> None:
    """As :func:`run_passes`, in one thread."""
    num, dtype = rows.shape[1], products.dtype
    width = num * (kept[0] + 1)
    most = kept.max()
    work = Work(
        products,
        order,
        kept,
        np.empty((2, num, width), np.int64),
        np.empty((2, num), np.int64),
        np.empty((2, num, most + 1, num), np.int64),
        np.empty((2, num, most), dtype),
        np.empty((width, width), dtype),
        np.empty((most + 1, width), dtype),
        np.empty((width, most + 1), dtype),
        np.empty((most + 1, most + 1), dtype),
        np.empty(most * most, dtype),
        np.empty(most, np.int64),
        np.empty(max(most * most, width, len(products) // num), np.int64),
        np.empty(most, dtype),
    )
    scores = np.empty(len(products), dtype)
    new = np.empty(num, np.int64)
    for b in range(len(rows)):
        current = rows[b]
        scores[:] = linear[b]
        for n in range(0, num - 1, 2):  # a single codebook has no products
            _add_twice(scores, products[current[n]], products[current[n + 1]])
        for i in range(iters):
            _take_candidates(work, scores, current)
            _join_all(work, new)
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
def _add_twice(scores: ndarray, row: ndarray, other: ndarray) -> None:
    for i in range(len(scores)):
        product = row[i] + other[i]
        scores[i] += product + product


@_compiled
def _move(scores: ndarray, new: ndarray, old: ndarray) -> None:
    for i in range(len(scores)):
        change = new[i] - old[i]
        scores[i] += change + change


@_compiled
def _take_candidates(work: Work, scores: ndarray, current: ndarray) -> None:
    """The best centres of every codebook, each codebook a group of its own."""
    num, count, best = len(work.order), work.kept[0], work.best
    centers, members = work.centers[0], work.members[0]
    size = len(scores) // num
    for g in range(num):
        first = work.order[g] * size
        own = scores[first : first + size]
        _smallest(own, count, best, work.pool, work.bounds)
        centers[g, 0] = current[g]
        members[g, 0, 0] = 0
        work.widths[0, g] = count + 1
        for c in range(count):
            centers[g, c + 1] = first + best[c]
            members[g, c + 1, 0] = c + 1
            work.scores[0, g, c] = own[best[c]]


@_compiled
def _smallest(
    values: ndarray, count: int, best: ndarray, pool: ndarray, bounds: ndarray
) -> None:
    """Write positions of the ``count`` smallest values, in any order, to the best.

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
def _join_all(work: Work, new: ndarray) -> None:
    """Join groups pair by pair into one; its best candidate goes into new."""
    num = len(new)
    joined, level, source = 1, 0, 0
    while joined < num:
        old, count = work.kept[level], work.kept[level + 1]
        for g in range(num // (2 * joined)):
            _cross_products(work, source, 2 * g, old, joined)
            _joint_scores(work, source, 2 * g, old)
            joint = work.joint[: old * old]
            _smallest(joint, count, work.best, work.pool, work.bounds)
            _join(work, source, g, old, count, joined)
        joined *= 2
        level += 1
        source = 1 - source
    for n in range(num):
        new[n] = work.centers[source, 0, work.members[source, 0, 1, n]]


@_compiled
def _cross_products(
    work: Work, source: int, left: int, count: int, joined: int
) -> None:
    """cross[j, i]: products of candidate i of group left and j of the one after it."""
    products, right = work.products, left + 1
    centers, members = work.centers[source], work.members[source]
    width, span = work.widths[source, left], work.widths[source, right]
    cross, block = work.cross, work.block
    partial, turned = work.partial, work.turned
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
def _joint_scores(work: Work, source: int, left: int, count: int) -> None:
    """joint[j * count + i]: of candidate i of group left and j of the one after it."""
    cross, scores, joint = work.cross, work.scores[source], work.joint
    # d_a.d_b of the changes d, up to a constant, is a.b - a.b' - a'.b, with a' and b'
    # the present choice.
    for j in range(count):
        of_right = scores[left + 1, j] - cross[j + 1, 0] - cross[j + 1, 0]
        for i in range(count):
            product = cross[j + 1, i + 1] - cross[0, i + 1]
            joint[j * count + i] = scores[left, i] + of_right + product + product


@_compiled
def _join(
    work: Work, source: int, group: int, old: int, count: int, joined: int
) -> None:
    """Make a group of two: its candidates are the best pairs, with centres they use."""
    left, right, target = 2 * group, 2 * group + 1, 1 - source
    start = work.widths[source, left]
    members, before = work.members[target, group], work.members[source]
    for c in range(count + 1):
        i = j = 0
        if c > 0:
            pair = work.best[c - 1]
            i, j = pair % old + 1, pair // old + 1
            work.scores[target, group, c - 1] = work.joint[pair]
        for n in range(joined):
            members[c, n] = before[left, i, n]
            members[c, joined + n] = start + before[right, j, n]
    # Centres that no candidate uses are dropped, so that later blocks are small.
    place = work.pool
    place[: start + work.widths[source, right]] = -1
    kept = 0
    for c in range(count + 1):
        for n in range(2 * joined):
            old_place = members[c, n]
            if place[old_place] < 0:
                place[old_place] = kept
                if old_place < start:
                    center = work.centers[source, left, old_place]
                else:
                    center = work.centers[source, right, old_place - start]
                work.centers[target, group, kept] = center
                kept += 1
            members[c, n] = place[old_place]
    work.widths[target, group] = kept
