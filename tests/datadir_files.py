"""Entries of data directories in memory, for comparison."""

from collections.abc import Iterable
from pathlib import Path

from espnet2_spear.fileio.datadir import DataDir, Entry


def gather(found: Iterable[Entry], path: Path = Path(".")) -> DataDir:
    """Hold entries in memory."""
    data = DataDir(wav_scp={}, utt2spk={}, path=path)
    for entry in found:
        assert entry.utt not in data.utt2spk
        data.wav_scp[entry.recording] = entry.path
        data.utt2spk[entry.utt] = entry.speaker
        if entry.segment is not None:
            data.segments = data.segments or {}
            data.segments[entry.utt] = entry.segment
        if entry.domain:
            data.utt2domain[entry.utt] = entry.domain
        if entry.text is not None:
            data.text[entry.utt] = entry.text
        if entry.samples is not None:
            data.utt2num_samples[entry.utt] = entry.samples
    return data
