"""Audio of any form to 16-bit mono files of one rate, in shards of utterances."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import soundfile

from espnet2_spear.fileio.atomic import TEXT, write_atomically
from espnet2_spear.fileio.audio import (
    AudioError,
    AudioInfo,
    Span,
    read_pieces,
    resample,
    to_int16,
)
from espnet2_spear.fileio.datadir import Entry
from espnet2_spear.fileio.decode import split_ark
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.hashes import digest_of
from espnet2_spear.fileio.names import file_name, small_folder
from espnet2_spear.fileio.shards import DoneMarks

SHARD_UTTERANCES = 100  # about: converted at a time, and in an ark
AUDIO_FORMATS = ("flac", "wav", "flac.ark", "wav.ark")
CLIPPED_SHARE = 0.01  # of samples: more are noted
# Utterance, samples, audio file -> its value in wav.scp.
Write = Callable[[str, np.ndarray, bytes], str]


@dataclass(frozen=True)
class AudioSource:
    """A recording and the pieces that are wanted of it."""

    path: str
    pieces: tuple[tuple[str, Span], ...]  # utterance and where it is


@dataclass(frozen=True)
class Result:
    """Outcome for an utterance; ``reason`` is set where it was skipped.

    ``peak_db`` is the largest deviation from the mean in dB of full scale, ``notes``
    what is wrong with the recording though it was read.
    """

    utt: str
    file: str = ""
    samples: int = 0
    peak_db: float = 0.0
    source_rate: int = 0
    source_channels: int = 0
    clipped: int = 0
    notes: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Options:
    """Options of writing.

    Attributes:
        out_dir: folder.
        audio_format: ``flac`` or ``wav``, a file an utterance; ``flac.ark`` or
            ``wav.ark``, an ark a shard, as ESPnet's scripts have them.
        fs: sampling rate in Hz.
        strict: whether a recording whose header is wrong is skipped.
    """

    out_dir: str
    audio_format: str
    fs: int
    strict: bool = False

    @property
    def codec(self) -> str:
        """``flac`` or ``wav``."""
        return self.audio_format.removesuffix(".ark")


def write_file(utt: str, pcm: np.ndarray, content: bytes, options: Options) -> str:
    """Write the content of an audio file; returns what wav.scp says of it.

    The name has a checksum of the samples. So whatever knows audio by its path, as
    codes and embeddings do, sees that a recording was exchanged for another one.
    """
    folder = os.path.join(options.out_dir, options.codec, small_folder(utt))
    name = file_name(utt, f".{zlib.crc32(pcm):08x}.{options.codec}")
    path = os.path.join(folder, name)
    write_atomically(path, content)
    return path


class Ark:
    """Writes audio into one Kaldi ark, which appears at the end.

    Args:
        path: of the ark.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._content = path, bytearray()

    def write(self, utt: str, pcm: np.ndarray, content: bytes) -> str:
        """Append the content of an audio file; returns what wav.scp says of it."""
        self._content += f"{utt} ".encode(**TEXT)
        offset = len(self._content)
        if content[:4] != b"RIFF":  # Kaldi's own form of wav, kaldiio's of others
            size = len(content)
            self._content += b"AUDIO\x08" + size.to_bytes(8, "little")
        self._content += content
        return f"{self._path}:{offset}"

    def finish(self) -> list[Path]:
        """Write the ark, if it has entries."""
        if not self._content:
            return []
        write_atomically(self._path, self._content)
        return [self._path]


def recordings_of(found: Iterable[Entry]) -> Iterator[AudioSource]:
    """Group utterances by recording."""
    # Sorted on disk: the utterances of a recording need not follow each other.
    with ExternalSorter[tuple[str, str, str, Span]]() as pieces:
        for entry in found:
            if entry.segment is None:
                whole = Span(0.0, None, None)
                yield AudioSource(entry.path, ((entry.utt, whole),))
                continue
            where = entry.segment.span
            pieces.add((entry.recording, entry.path, entry.utt, where))
        for _, group in groupby(pieces, key=itemgetter(0)):
            rows = list(group)
            yield AudioSource(
                rows[0][1], tuple((utt, span) for _, _, utt, span in rows)
            )


def shards_of(
    recordings: Iterable[AudioSource], size: int
) -> Iterator[list[AudioSource]]:
    """Deal recordings into shards of about ``size`` utterances."""
    shard: list[AudioSource] = []
    count = 0
    for recording in recordings:
        shard.append(recording)
        count += len(recording.pieces)
        if count >= size:
            yield shard
            shard, count = [], 0
    if shard:
        yield shard


def shard_digest(shard: list[AudioSource], options: Options) -> str:
    """Return a hash of all that a shard's results depend on."""
    stamps = []
    for recording in shard:
        try:
            stat = os.stat(split_ark(recording.path)[0])
            stamps.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            stamps.append((-1, -1))
    return digest_of([[asdict(r) for r in shard], stamps, asdict(options)])[:32]


def finish_shard(
    shard: list[AudioSource], options: Options
) -> tuple[list[Result], bool]:
    """Convert a shard unless it is done; returns its results, and if it was done.

    It is done again if one of its files does not hold what was written to it.
    """
    digest = shard_digest(shard, options)
    folder = digest[:2]  # 256 folders keep each of them small
    marks = DoneMarks(options.out_dir, f".shards/{folder}/{digest}", digest)
    before = marks.read(0)
    if before is not None:
        return [Result(**record) for record in before], True
    ark = Ark(Path(options.out_dir) / options.codec / folder / f"{digest}.ark")
    if options.codec == options.audio_format:
        results = format_shard(shard, options, partial(write_file, options=options))
        files = [Path(result.file) for result in results if result.file]
    else:
        results = format_shard(shard, options, ark.write)
        files = ark.finish()
    marks.write(0, [asdict(result) for result in results], files)
    return results, False


def format_shard(
    shard: list[AudioSource], options: Options, write: Write
) -> list[Result]:
    """Convert the recordings of a shard.

    What fails is tried once more at the end: a file server may have been busy for a
    moment.
    """
    results = {r.utt: r for rec in shard for r in format_recording(rec, options, write)}
    for recording in shard:
        if failed := [piece for piece in recording.pieces if results[piece[0]].reason]:
            again = replace(recording, pieces=tuple(failed))
            results |= {r.utt: r for r in format_recording(again, options, write)}
    return list(results.values())


def format_recording(
    recording: AudioSource, options: Options, write: Write
) -> Iterator[Result]:
    """Convert the pieces of one recording; yield a result for each."""
    done = 0
    try:
        for samples, info in _read(recording, options.strict):
            utt = recording.pieces[done][0]
            done += 1
            if isinstance(samples, AudioError):
                yield Result(utt, reason=samples.reason, detail=str(samples))
                continue
            samples = resample(samples, info.rate, options.fs)
            if not len(samples):
                yield Result(
                    utt, reason="empty", detail=f"{recording.path}: no samples"
                )
                continue
            pcm, clipped = to_int16(samples)
            notes = info.notes
            if clipped > CLIPPED_SHARE * len(pcm):
                share = clipped / len(pcm)
                notes += (f"clipped {share:.1%} of its samples are over full scale",)
            buffer = io.BytesIO()
            soundfile.write(buffer, pcm, options.fs, "PCM_16", format=options.codec)
            file = write(utt, pcm, buffer.getvalue())
            yield Result(
                utt,
                file,
                len(pcm),
                peak_db(pcm),
                info.rate,
                info.channels,
                clipped,
                notes,
            )
    except AudioError as error:
        for utt, _ in recording.pieces[done:]:
            yield Result(utt, reason=error.reason, detail=str(error))


def _read(
    recording: AudioSource, strict: bool
) -> Iterator[tuple[np.ndarray | AudioError, AudioInfo]]:
    """Read the pieces of a recording; errors of the file system are AudioErrors.

    So they are told from those of writing, such as no space left.
    """
    try:
        spans = [span for _, span in recording.pieces]
        yield from read_pieces(recording.path, spans, strict)
    except OSError as error:
        remedy = "see that its disk is there and can be read"
        raise AudioError(
            recording.path, "unreadable", error.strerror or str(error), remedy
        ) from error


def peak_db(pcm: np.ndarray) -> float:
    """Return the largest deviation from the mean in dB of full scale, at least -120."""
    peak = np.abs(pcm - pcm.mean()).max() / 32768
    return float(20 * np.log10(max(peak, 1e-6)))
