"""Kaldi data directories: held in memory, of noise, and as options of a training."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from espnet2_spear.fileio.datadir import Entry, entries, write_entries

RATE = 16000
Utterances = dict[str, Entry]


def read_dir(path: Path, *require: str) -> Utterances:
    """The utterances by id; ``require`` is that of :func:`entries`."""
    return {entry.utt: entry for entry in entries(path, require)}


def write_dir(path: Path, found: Iterable[Entry]) -> None:
    """Write utterances in whatever order they come."""
    write_entries(sorted(found), path)


def noise_dir(
    folder: Path, lengths: Mapping[str, int], **fields: str | Mapping[str, str]
) -> Path:
    """Write noise as a data directory, and return it.

    Args:
        folder: is made, and gets ``<utterance>.wav`` as well.
        lengths: utterance -> samples.
        fields: of :class:`Entry`: the same for all, or utterance -> value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    found = []
    for utt, samples in lengths.items():
        wav = folder / f"{utt}.wav"
        noise = 0.1 * rng.standard_normal(samples)
        soundfile.write(wav, noise.astype(np.float32), RATE)
        own = {k: v if isinstance(v, str) else v[utt] for k, v in fields.items()}
        found.append(Entry(utt, str(wav), utt, samples=samples, **own))
    write_dir(folder, found)
    return folder


def espnet_data(
    files: Mapping[str, tuple[str | Path, str]],
    shape: str | Path,
    splits: Sequence[str] = ("train", "valid"),
) -> list[str]:
    """Options of ESPnet that name the data of a training.

    Args:
        files: name -> file and its kind.
        shape: lengths of the utterances.
        splits: that these are the data of.
    """
    options = []
    for split in splits:
        for name, (file, kind) in files.items():
            options += [f"--{split}_data_path_and_name_and_type"]
            options += [f"{file},{name},{kind}"]
        options += [f"--{split}_shape_file", str(shape)]
    return options
