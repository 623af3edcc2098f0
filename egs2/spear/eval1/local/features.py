"""Features of clips, computed once for each system and set of clips, and kept on disk.

Only the first 10 s of a clip are embedded, but all of it where a text is read from it
(head `ctc`); silence follows clips shorter than 0.5 s. Kept are, for the head `linear`,
mean and standard deviation over time of every layer, (clips, layers, 2 channels)
float32; and for the others all frames, (frames, layers, channels) float16.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from systems import System
from tasks import TaskError
from torch import Tensor, nn

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.atomic import atomic
from espnet2_spear.fileio.audio import audio_info, read_audio
from espnet2_spear.fileio.decode import split_ark

SHORTEST, LONGEST = SAMPLE_RATE // 2, 10 * SAMPLE_RATE  # samples
BATCH = 30 * SAMPLE_RATE  # samples that are embedded at once, padding included


@dataclass
class Features:
    """Features of clips.

    Attributes:
        values: (clips, layers, 2 channels), or all frames (frames, layers, channels).
        rows: utterance -> its rows.
        seconds: utterance -> the audio that was embedded.
    """

    values: np.ndarray
    rows: dict[str, slice]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Noise:
    """Noise that is added to clips; a recording serves one part alone.

    So a probe that was trained in noise is tested in noise that it has never heard.

    Attributes:
        files: recording -> file, five or more.
        snr: dB, of mean squares.
        parts: utterance -> its part (train, dev, test).
    """

    files: Mapping[str, str]
    snr: float
    parts: Mapping[str, str]

    def recordings(self) -> dict[str, list[str]]:
        """Part -> files: of five neighbours the fourth is of dev, the fifth of test."""
        files = list(self.files.values())
        if len(files) < 5:
            raise TaskError(f"noise: {len(files)} recordings; at least 5 are needed")
        rest = [file for i, file in enumerate(files) if i % 5 < 3]
        return {"train": rest, "dev": files[3::5], "test": files[4::5]}


def kept_features(
    cache: Path,
    system: System,
    wavs: Mapping[str, str],
    head: str,
    noise: Noise | None = None,
    device: str = "cpu",
) -> Features:
    """Read features from the cache, or compute and keep them.

    Args:
        cache: path without suffix: `.npy` holds the values, `.json` what they are of.
        system: what computes them.
        wavs: utterance -> file at 16 kHz, or entry of an ark (``file.ark:offset``).
        head: what they are for.
        noise: that is added.
        device: to compute on.
    """
    facts = {
        "system": system.identity,
        "head": head,
        "clips": _digest(wavs),
        "noise": noise and [_digest(noise.files), noise.snr, dict(noise.parts)],
        "longest": None if head == "ctc" else LONGEST,
    }
    array, index = (cache.with_name(cache.name + end) for end in (".npy", ".json"))
    if (found := _read(array, index, facts)) is not None:
        return found
    logging.info("%s: features of %d clips", cache, len(wavs))
    parts: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        for utts, speech, lengths in _batches(wavs, noise, facts["longest"]):
            layers, counts = system.embed(speech.to(device), lengths.to(device))
            frames = torch.stack(layers, dim=2)
            seconds |= zip(utts, (lengths / SAMPLE_RATE).tolist(), strict=True)
            for utt, clip, count in zip(utts, frames, counts.tolist(), strict=True):
                part = clip[:count]
                part = _pool(part) if head == "linear" else part.half()
                parts[utt] = part.cpu().numpy()
                if not np.isfinite(parts[utt]).all():
                    raise TaskError(
                        f"{wavs[utt]}: {system.title} gives values that are not finite"
                    )
    rows, begin = {}, 0
    for utt in wavs:
        rows[utt] = [begin, begin + len(parts[utt])]
        begin += len(parts[utt])
    index.unlink(missing_ok=True)  # of other features
    values = np.concatenate([parts[utt] for utt in wavs])
    with atomic(array) as file:
        np.save(file, values)
    facts |= {"bytes": array.stat().st_size, "rows": rows, "seconds": seconds}
    with atomic(index, "w") as file:
        file.write(json.dumps(facts))
    return Features(values, {u: slice(*ends) for u, ends in rows.items()}, seconds)


def _read(array: Path, index: Path, facts: Mapping[str, object]) -> Features | None:
    """Features that are whole and of the same system and clips, or None; logs why."""
    if not index.exists():
        return None
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        changed = [
            name
            for name, value in facts.items()
            if name not in found or found[name] != value
        ]
        if not array.exists() or array.stat().st_size != found["bytes"]:
            changed.append("file")
        if changed:
            logging.info("%s: made again, other %s", array, ", ".join(changed))
            return None
        rows = {utt: slice(*ends) for utt, ends in found["rows"].items()}
        values = np.load(array, mmap_mode="r", allow_pickle=False)
        return Features(values, rows, found["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning("%s: made again, it is damaged (%s)", array, error)
        return None


def _digest(wavs: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for utt, path in wavs.items():
        file, offset = split_ark(path)
        if not file.exists():
            marked = (p for p in file.parents if (p / ".done.json").exists())
            raise TaskError(
                f"{file}: is gone; remove {next(marked, file.parent)}, and stage 2 of "
                "run.sh makes it again"
            )
        facts = f"{utt} {file.name}:{offset} {file.stat().st_size}\n"
        digest.update(facts.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _size(path: str) -> int:
    """Tells which clips are of similar lengths: bytes of a file, samples in an ark."""
    file, offset = split_ark(path)
    return file.stat().st_size if offset is None else audio_info(path).samples


def _pool(layers: Tensor) -> Tensor:
    """Mean and standard deviation over time: (1, layers, 2 channels)."""
    layers = layers.float()
    return torch.cat([layers.mean(0), layers.std(0, correction=0)], dim=-1)[None]


def _batches(
    wavs: Mapping[str, str],
    noise: Noise | None,
    longest: int | None,
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Names, waveforms (B, samples) and lengths (B,) of clips of similar lengths."""
    recordings = {} if noise is None else noise.recordings()
    sources = {part: [_samples(f) for f in files] for part, files in recordings.items()}
    utts: list[str] = []
    batch: list[Tensor] = []
    for utt in sorted(wavs, key=lambda utt: _size(wavs[utt])):
        speech = _samples(wavs[utt])[:longest]
        speech = F.pad(speech, (0, max(0, SHORTEST - len(speech))))
        if noise is not None:
            speech = add_noise(speech, sources[noise.parts[utt]], noise.snr, utt)
        width = max(map(len, [speech, *batch]))
        if batch and width * (len(batch) + 1) > BATCH:
            yield utts, *_padded(batch)
            utts, batch = [], []
        utts.append(utt)
        batch.append(speech)
    if batch:
        yield utts, *_padded(batch)


def _padded(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(speech) for speech in batch])
    return nn.utils.rnn.pad_sequence(batch, batch_first=True), lengths


def _samples(path: str) -> Tensor:
    samples, rate = read_audio(path)
    if rate != SAMPLE_RATE:
        raise TaskError(f"{path}: is at {rate} Hz; run stage 2 of run.sh again")
    return torch.from_numpy(samples)


def add_noise(speech: Tensor, sources: list[Tensor], snr: float, utt: str) -> Tensor:
    """Add noise at an SNR; which noise is added depends on the name of the clip alone.

    Args:
        speech: (samples,).
        sources: noise clips; one after another until the speech is covered.
        snr: dB, of mean squares.
        utt: the clip's name.
    """
    seed = int.from_bytes(hashlib.sha256(utt.encode()).digest()[:8], "big")
    generator = torch.Generator().manual_seed(seed % 2**63)
    order = torch.randperm(len(sources), generator=generator).tolist()
    noise = torch.cat([sources[i] for i in order])
    noise = noise.roll(int(torch.randint(len(noise), (), generator=generator)))
    noise = noise.repeat(-(-len(speech) // len(noise)))[: len(speech)]
    power = noise.square().mean().clamp(min=1e-10)
    gain = (speech.square().mean() / power * 10 ** (-snr / 10)).sqrt()
    return speech + gain * noise
