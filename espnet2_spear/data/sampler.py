"""Sampler: the utterances of each optimizer step, by weight, for any number of GPUs.

The utterances of step t are a function of the data, the options and t alone. Nothing is
drawn in one process and sent to others, nothing is stored but counts, and a training
can go on at any step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.data.manifest import OTHERS, Group, Manifest
from espnet2_spear.data.permutation import hash64, permuted
from espnet2_spear.fileio.tables import DataDirError

BLOCK = 1024  # steps whose buckets are drawn at once
GOLDEN = 0.6180339887498949
CANDIDATES = 200  # lengths that may become edges of buckets
MIN_STEPS = 4  # that the utterances of a bucket suffice for, unless it is the only one


@dataclass(frozen=True)
class SamplerConfig:
    """Options of ``--sampler_conf``.

    Attributes:
        domain_weights: domain -> how often its utterances are seen, relative to those
            of weight 1 (which absent ones have). 0 leaves them out.
        corpus_weights: corpus -> the same; multiplies the domain's. A corpus is named
            by what its ids begin with, up to the first hyphen.
        num_buckets: spans of lengths whose utterances share batches, at most.
        mix_headroom_seconds: what mixing may add to an utterance; counted for each.
            null: what ``mixer_conf`` can add, which whoever builds the sampler fills
            in (0 without a mixer).
        max_utts: utterances in a GPU's batch, at most; null: as many as fit.
        step_shards: equal parts that every step is made of, and which GPUs and
            accumulated batches share; null: one for each of them.
    """

    domain_weights: Mapping[str, float] = field(default_factory=dict)
    corpus_weights: Mapping[str, float] = field(default_factory=dict)
    num_buckets: int = 30
    mix_headroom_seconds: float | None = None
    max_utts: int | None = None
    step_shards: int | None = None

    def __post_init__(self) -> None:
        for name in ("domain_weights", "corpus_weights"):
            for key, weight in getattr(self, name).items():
                if not (
                    isinstance(weight, (int, float)) and 0 <= weight < float("inf")
                ):
                    raise ValueError(
                        f"sampler_conf.{name}.{key} = {weight!r}: a number that is not "
                        "negative is needed"
                    )
        for name in ("num_buckets", "max_utts", "step_shards"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"sampler_conf.{name} = {value!r}: 1 or more is needed"
                )
        if self.mix_headroom_seconds is not None and not self.mix_headroom_seconds >= 0:
            raise ValueError("sampler_conf.mix_headroom_seconds is negative")

    def weight(self, group: Group) -> float:
        """Frequency of a group's utterances, relative to weight 1."""
        domain = self.domain_weights.get(group.domain, 1.0)
        if group.corpus == OTHERS:
            return domain
        return domain * self.corpus_weights[group.corpus]


class StepSampler:
    """Steps of utterances of similar length.

    A step of ``shards * n`` utterances comes from one bucket (a span of lengths); n is
    how many of the bucket's longest utterances, after mixing, fit into
    ``shard_samples``. Buckets take turns so that all utterances of weight 1 are seen
    equally often. Within a bucket every group has its share of every step (rounded up
    or down, in turn), and goes through all its utterances in a random order before it
    begins again in another.

    No utterance is in a step twice, unless a group has a weight so large that a step
    needs more utterances than the group has in the bucket.

    Args:
        manifest: the utterances.
        config: weights, buckets and bounds.
        shard_samples: bound of a shard, in samples, with padding and mixing.
        shards: of a step.
        seed: not negative.

    Attributes:
        per_shard: int64 (buckets,), utterances of each in a shard.
        longest: int64 (buckets,), samples of its longest utterance.
        probability: float64 (buckets,), of a step to come from it.
        steps_per_pass: steps in which utterances of weight 1 are seen once.

    Raises:
        DataDirError: an utterance that is longer than a shard, fewer utterances than
            shards, or nothing with a weight.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: SamplerConfig,
        shard_samples: int,
        shards: int,
        seed: int = 0,
    ) -> None:
        self.manifest, self.config, self.seed = manifest, config, seed
        self.shard_samples, self.shards = shard_samples, shards
        self.headroom = round((config.mix_headroom_seconds or 0.0) * SAMPLE_RATE)
        self.groups = [g for g in manifest.groups if config.weight(g) > 0]
        if not self.groups:
            raise DataDirError("sampler_conf: all utterances have weight 0")
        self._weights = np.array([config.weight(group) for group in self.groups])
        self._place_buckets()
        rows = self._counts * self._weights
        totals = rows.sum(axis=1)
        self._step_rows = self.per_shard * shards
        steps = totals / self._step_rows
        self.steps_per_pass = float(steps.sum())
        self.probability = steps / steps.sum()
        shares = np.cumsum(rows, axis=1) / totals[:, None]
        shares[:, -1] = 1.0
        bounds = np.concatenate([np.zeros((len(steps), 1)), shares], axis=1)
        self._bounds = bounds * self._step_rows[:, None]
        self._drawn: tuple[int, np.ndarray] = (0, np.zeros_like(self._counts))

    def _place_buckets(self) -> None:
        """Choose spans of lengths; sets the rows of every group in each."""
        longest = max(int(self.manifest.samples[g.last - 1]) for g in self.groups)
        if self._fitting(longest) < 1:
            group = max(self.groups, key=lambda g: self.manifest.samples[g.last - 1])
            utt, _ = self.manifest.entry(group.last - 1)
            raise DataDirError(
                f"utterance '{utt}' of {longest / SAMPLE_RATE:.1f} s (and "
                f"{self.headroom / SAMPLE_RATE:.1f} s for mixing) is longer than a "
                f"shard of {self.shard_samples / SAMPLE_RATE:.1f} s (batch_bins * "
                f"accum_grad / {self.shards} shards a step); raise batch_bins, or "
                "filter by length (stage 3, --max_seconds)"
            )
        edges = self._edges(longest)
        firsts, lasts = self._spans(edges)
        rows = (lasts - firsts).sum(axis=1)
        ends = np.where(lasts > firsts, lasts - 1, 0)
        lengths = np.where(lasts > firsts, self.manifest.samples[ends], 0)
        if rows.sum() < self.shards:
            raise DataDirError(
                f"{rows.sum()} utterances for steps of {self.shards} shards; use fewer "
                "GPUs, or more data"
            )
        self._first, self._counts = firsts, lasts - firsts
        self.longest = lengths.max(axis=1).astype(np.int64)
        self.per_shard = np.minimum(self._fitting(self.longest), rows // self.shards)

    def _fitting(self, samples: np.ndarray | int) -> np.ndarray:
        """How many utterances of a length fit a shard."""
        fitting = self.shard_samples // (np.asarray(samples, np.int64) + self.headroom)
        most = self.config.max_utts
        return fitting if most is None else np.minimum(fitting, most)

    def _edges(self, longest: int) -> np.ndarray:
        """Longest lengths of buckets, so that as little as possible is padding.

        Only lengths of which a whole number fills a shard are considered; of these the
        best at most ``num_buckets`` are found by dynamic programming.
        """
        shortest = min(int(self.manifest.samples[g.first]) for g in self.groups)
        fitting = self._fitting(np.array([shortest, longest]))
        fitting = np.unique(np.geomspace(*fitting, CANDIDATES).astype(np.int64))
        edges = self.shard_samples // fitting - self.headroom
        if self.config.max_utts is not None:  # which is what fits below some length
            more = np.geomspace(shortest, max(shortest, edges.min()), CANDIDATES)
            edges = np.append(edges, more.astype(np.int64))
        edges = np.unique(np.append(edges[edges < longest], longest))
        _, lasts = self._spans(edges)
        below = np.concatenate([np.zeros((1, len(self.groups)), np.int64), lasts])
        below[1:] -= np.array([g.first for g in self.groups])
        rows, weighted = below.sum(axis=1), below @ self._weights
        # cost[i, j]: what utterances above edge i - 1 and up to edge j cost together.
        cost = (weighted[1:] - weighted[:-1, None]) * edges
        enough = MIN_STEPS * self.shards * self._fitting(edges)
        cost[rows[1:] - rows[:-1, None] < enough] = np.inf
        cost[np.tril_indices(len(edges), -1)] = np.inf
        best, paths = np.append(0.0, np.full(len(edges), np.inf)), []
        totals = [np.inf]
        for _ in range(self.config.num_buckets):
            through = best[:-1, None] + cost
            paths.append(through.argmin(axis=0))
            best = np.append(np.inf, through.min(axis=0))
            totals.append(best[-1])
        number, end = int(np.argmin(totals)), len(edges) - 1
        chosen = [end]
        for path in paths[:number][::-1]:
            end = int(path[end]) - 1
            chosen.append(end)
        # Too little for any: all in one.
        return edges[sorted(i for i in set(chosen) if i >= 0)]

    def _spans(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last + 1 rows of every (bucket, group)."""
        # In the type of the lengths: NumPy would convert all of these otherwise.
        edges = edges.astype(self.manifest.samples.dtype)
        lasts = np.stack(
            [
                g.first
                + np.searchsorted(
                    self.manifest.samples[g.first : g.last], edges, "right"
                )
                for g in self.groups
            ],
            axis=1,
        ).astype(np.int64)
        start = np.array([[g.first for g in self.groups]], np.int64)
        return np.concatenate([start, lasts[:-1]]), lasts

    def steps(self, start: int = 0) -> Iterator[np.ndarray]:
        """Rows of step ``start`` and all that follow, int64 (shards * n,) each.

        Row ``s * n + i`` is the i-th of shard s.
        """
        number, skip = divmod(start, BLOCK)
        while True:
            drawn = self._drawn_before(number)
            buckets, counts = self._block(number, drawn)
            np.add.at(drawn, buckets[:skip], counts[:skip])
            for place in range(skip, BLOCK):
                bucket, count = int(buckets[place]), counts[place]
                before = drawn[bucket].copy()
                drawn[bucket] += count
                rows = self._rows(bucket, before, count)
                random = _random(self.seed, 1, number * BLOCK + place)
                yield rows[random.permutation(len(rows))]
            number, skip = number + 1, 0

    def _drawn_before(self, number: int) -> np.ndarray:
        """Utterances that each (bucket, group) has given before a block; a copy."""
        known, drawn = self._drawn
        if known > number:
            known, drawn = 0, np.zeros_like(drawn)
        drawn = drawn.copy()
        for earlier in range(known, number):
            np.add.at(drawn, *self._block(earlier, drawn))
        self._drawn = number, drawn
        return drawn.copy()

    def _block(self, number: int, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Buckets (BLOCK,) and counts (BLOCK, groups) of the steps of a block."""
        random = _random(self.seed, 0, number)
        # One in every 1024th part: each bucket's steps are as many as expected, +-1.
        place = (random.permutation(BLOCK) + random.random_sample(BLOCK)) / BLOCK
        buckets = np.searchsorted(np.cumsum(self.probability)[:-1], place, "right")
        # Of the points i + offset of a step, a group has those in its share. Offsets of
        # a bucket's successive steps fill [0, 1) evenly.
        turn = (drawn.sum(axis=1) // self._step_rows)[buckets]
        order = np.argsort(buckets, kind="stable")
        turn[order] += np.arange(BLOCK) - np.searchsorted(
            buckets[order], buckets[order]
        )
        offset = (turn * GOLDEN)[:, None] % 1
        below = np.ceil(self._bounds[buckets] - offset)
        below = np.clip(below, 0, self._step_rows[buckets, None]).astype(np.int64)
        return buckets, np.diff(below, axis=1)

    def _rows(self, bucket: int, before: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Rows of a step in the order of their groups.

        Args:
            bucket: that it comes from.
            before: utterances that each group has given from there.
            counts: utterances that each group gives.
        """
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        groups = np.repeat(np.arange(len(counts)), counts)
        rows = self._lookup(bucket, groups, np.repeat(before, counts) + within)
        if len(np.unique(rows)) == len(rows):
            return rows
        # The end of one order of a group and the beginning of the next may share
        # utterances: those of the next are passed over.
        parts = np.split(rows, np.cumsum(counts)[:-1])
        for group in np.flatnonzero(counts):
            if counts[group] > self._counts[bucket, group]:
                continue  # it has not so many
            kept = dict.fromkeys(parts[group].tolist())
            place = before[group] + counts[group]
            while len(kept) < counts[group]:
                (row,) = self._lookup(bucket, np.array([group]), np.array([place]))
                kept.setdefault(int(row))
                place += 1
            parts[group] = np.array(list(kept), np.int64)
        return np.concatenate(parts)

    def _lookup(self, bucket: int, groups: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Rows at places of the endless orders of groups in a bucket."""
        count, first = self._counts[bucket, groups], self._first[bucket, groups]
        number, index = np.divmod(place, count)
        return first + permuted(index, count, hash64(self.seed, first, number))

    def log(self) -> None:
        """Write what is seen how often to the log."""
        seconds = np.array([g.samples for g in self.groups]) * self._weights
        for group, weight, part in zip(
            self.groups, self._weights, seconds / seconds.sum(), strict=True
        ):
            logging.info(
                f"sampling: {group.corpus or 'corpus without a weight'}, "
                f"{group.domain}: {group.last - group.first} utterances, "
                f"{group.samples / SAMPLE_RATE / 3600:.1f} h, weight {weight:g}, "
                f"{part:.1%} of the audio seen"
            )
        logging.info(
            f"sampling: {len(self.longest)} buckets up to "
            + ", ".join(f"{n / SAMPLE_RATE:.1f}" for n in self.longest)
            + f" s; {self.shards} shards a step, of "
            + ", ".join(map(str, self.per_shard))
            + f" utterances and at most {self.shard_samples / SAMPLE_RATE:.1f} s with "
            f"padding and mixing; weight 1 is seen once in {self.steps_per_pass:.1f} "
            "steps"
        )


def validation_batches(
    samples: np.ndarray, bound: int, max_utts: int | None, world_size: int
) -> list[np.ndarray]:
    """Batches that hold every utterance once, from short to long, for validation.

    Args:
        samples: lengths (rows,).
        bound: of a batch, in samples, with padding.
        max_utts: in a batch, at most.
        world_size: their number is a multiple of it, so that no rank waits for another.

    Returns:
        rows of each.

    Raises:
        DataDirError: an utterance over the bound, or too few utterances for as many
            batches on each rank.
    """
    samples = np.asarray(samples, np.int64)
    order = np.argsort(samples, kind="stable")
    if samples[order[-1]] > bound:
        raise DataDirError(
            f"an utterance of {samples[order[-1]] / SAMPLE_RATE:.1f} s is longer than "
            f"a batch of {bound / SAMPLE_RATE:.1f} s; raise valid_batch_bins"
        )
    most = max_utts or len(order)
    batches, first = [], 0
    for last in range(1, len(order) + 1):
        if last == len(order) or (
            last + 1 - first > most or (last + 1 - first) * samples[order[last]] > bound
        ):
            batches.append(order[first:last])
            first = last
    while len(batches) % world_size:
        large = max(range(len(batches)), key=lambda i: len(batches[i]))
        if len(batches[large]) == 1:
            raise DataDirError(
                f"{len(order)} utterances of validation make {len(batches)} batches of "
                f"up to {bound / SAMPLE_RATE:.1f} s, which {world_size} ranks cannot "
                "share equally; raise valid_batch_bins, or give more utterances"
            )
        batches[large : large + 1] = np.array_split(batches[large], 2)
    return batches


def _random(*key: int) -> np.random.RandomState:
    # Whose numbers are the same in all versions of NumPy.
    return np.random.RandomState(key)
