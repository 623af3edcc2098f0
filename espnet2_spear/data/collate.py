"""Batches of pre-training data, with noise to be mixed in."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence

import numpy as np
import torch
from espnet2.train.collate_fn import CommonCollateFn

from espnet2_spear.constants import MISSING
from espnet2_spear.data.noise import NoiseList

Utterance = tuple[str, dict[str, np.ndarray]]


class SpearCollateFn(CommonCollateFn):
    """Zero padding for audio, ignored targets for codes; noise clips by option.

    The clips depend on the seed, the epoch and the utterances of the batch, and on
    nothing else: neither on the worker nor on what was loaded before.

    Args:
        noise: recordings to draw from; None adds no noise.
        clips: noise clips a batch.
        seed: of the training.
    """

    def __init__(
        self, noise: NoiseList | None = None, clips: int = 8, seed: int = 0
    ) -> None:
        super().__init__(
            float_pad_value=0.0, int_pad_value=MISSING, not_sequence=["domain"]
        )
        if clips < 1:
            raise ValueError(f"{clips} noise clips a batch: at least 1 is needed")
        self.noise, self.clips, self.seed = noise, clips, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, before workers are started."""
        self.epoch = epoch

    def draw_noise(self, ids: Sequence[str]) -> list[tuple[str, np.ndarray]]:
        """Return the (name, samples) of the clips for a batch of these utterances.

        Raises:
            NoiseError: no noise could be read.
        """
        if self.noise is None:
            return []
        key = zlib.crc32("\n".join(ids).encode("utf-8", "surrogateescape"))
        rng = np.random.default_rng([self.seed, self.epoch, key])
        return self.noise.draw(rng, self.clips)

    def __call__(
        self, data: Collection[Utterance]
    ) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Make a batch.

        Returns:
            utterance ids; and the arrays, padded, with ``<name>_lengths``. With noise
            also ``noise`` (clips, samples) and ``noise_lengths`` (clips,).

        Raises:
            NoiseError: no noise could be read.
        """
        ids, batch = super().__call__(data)
        clips = [torch.from_numpy(clip) for _, clip in self.draw_noise(ids)]
        if clips:
            batch["noise"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
            batch["noise_lengths"] = torch.tensor([len(clip) for clip in clips])
        return ids, batch
