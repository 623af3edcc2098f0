"""Noise recordings that are drawn at random, and the batches they get into."""

from __future__ import annotations

import logging
import os
import zlib
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from espnet2.train.collate_fn import CommonCollateFn

from espnet2_spear.constants import MISSING, SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.audio import AudioError, audio_info, read_audio, resample
from espnet2_spear.fileio.tables import Lines, sorted_rows

NamedArrays = tuple[str, dict[str, np.ndarray]]


class NoiseList:
    """Recordings of a Kaldi ``wav.scp``, read when they are drawn.

    A recording that cannot be read is skipped: it is counted, named once in the log,
    and another is drawn in its place. Lines are read when they are drawn, too: memory
    is 8 bytes a line, which the workers of a loader share.

    Args:
        scp: ``name file`` lines; files of any format and rate.
        max_seconds: of longer recordings a random piece of this length is read.

    Attributes:
        skipped: recordings found unreadable, name -> reason.

    Raises:
        DataDirError: the list is malformed.
        UserError: the list is missing or empty, or holds commands.
    """

    # Draws of one clip before the list is taken to be useless.
    MAX_ATTEMPTS = 20

    def __init__(self, scp: str | os.PathLike[str], max_seconds: float = 40.0) -> None:
        self.scp = Path(scp)
        if not self.scp.is_file():
            raise UserError(
                f"{self.scp}: no such list of noise recordings (lines 'name file'). "
                "The recipe makes one of MUSAN: local/data_musan.py --root MUSAN "
                f"--out_dir {self.scp.parent}; or set noise_prob: 0 in mixer_conf.rules"
            )
        if max_seconds <= 0:
            raise UserError(f"max_seconds {max_seconds} of noise: must be above 0")
        self.max_seconds = max_seconds
        self._lines, self._places = Lines(self.scp), array("q")
        for name, file, place in sorted_rows(self.scp, "name file"):
            self._places.append(place)
            if file.endswith("|"):
                raise UserError(
                    f"{self.scp}: '{name}' is a command; commands in data files are "
                    "not run: decode to files and give their paths"
                )
        if not self._places:
            raise UserError(f"{self.scp}: no recordings; list some, or mix no noise")
        self.skipped: dict[str, str] = {}

    def __reduce__(self) -> tuple[type[NoiseList], tuple[Path, float]]:
        # Workers that are started afresh open the list themselves.
        return NoiseList, (self.scp, self.max_seconds)

    def __len__(self) -> int:
        return len(self._places)

    def draw(
        self, rng: np.random.Generator, count: int
    ) -> list[tuple[str, np.ndarray]]:
        """Draw clips, with replacement.

        Args:
            rng: decides everything.
            count: number of clips.

        Returns:
            (name, float32 samples at 16 kHz) each.

        Raises:
            UserError: one after the other could not be read.
            DataDirError: the list was changed since it was opened.
        """
        return [self._draw_one(rng) for _ in range(count)]

    def _draw_one(self, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        for _ in range(self.MAX_ATTEMPTS):
            name, file = self._lines.at(self._places[rng.integers(len(self))])
            where = rng.random()
            try:
                return name, self._read(file, where)
            except (AudioError, OSError) as error:
                if name not in self.skipped:
                    self.skipped[name] = str(error)
                    logging.warning(
                        f"noise '{name}' is skipped ({len(self.skipped)} so far in "
                        f"this process): {error}"
                    )
        reason = next(reversed(self.skipped.values()))
        raise UserError(
            f"{self.scp}: {self.MAX_ATTEMPTS} recordings drawn one after the other "
            f"could not be read, one of them because: {reason}"
        )

    def _read(self, file: str, where: float) -> np.ndarray:
        info = audio_info(file)
        start = end = None
        if info.seconds > self.max_seconds:
            start = where * (info.seconds - self.max_seconds)
            end = start + self.max_seconds
        samples, rate = read_audio(file, start, end)
        return resample(samples, rate, SAMPLE_RATE)


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
            UserError: no noise could be read.
        """
        if self.noise is None:
            return []
        key = zlib.crc32("\n".join(ids).encode("utf-8", "surrogateescape"))
        rng = np.random.default_rng([self.seed, self.epoch, key])
        return self.noise.draw(rng, self.clips)

    def __call__(
        self, data: Collection[NamedArrays]
    ) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Make a batch.

        Returns:
            utterance ids; and the arrays, padded, with ``<name>_lengths``. With noise
            also ``noise`` (clips, samples) and ``noise_lengths`` (clips,).

        Raises:
            UserError: no noise could be read.
        """
        ids, batch = super().__call__(data)
        clips = [torch.from_numpy(clip) for _, clip in self.draw_noise(ids)]
        if clips:
            batch["noise"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
            batch["noise_lengths"] = torch.tensor([len(clip) for clip in clips])
        return ids, batch
