"""Prepare cuts of lhotse, such as an icefall recipe leaves them, as a data directory.

Each cut is an utterance: a segment of its recording, of one channel or of the mean of
all. Its custom fields and supervisions go to a table `custom`, as JSON. Audio within a
folder of the form Shar is written to files in a folder `audio`.
"""

import json
from pathlib import Path
from typing import Any

from espnet2_spear.fileio.cuts import read_cuts, utterance_id
from espnet2_spear.fileio.datadir import Entry, Segment
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.names import short_id, small_folder
from espnet2_spear.fileio.tables import DataDirError, table_writer

CUSTOM = "custom"
SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg"}  # others: .mp3


def from_cuts(
    path: Path, name: str, domain: str, audio_root: Path, out_dir: Path
) -> ExternalSorter[Entry]:
    """Read cuts, and write their custom fields.

    Args:
        path: of the manifest, or of the folder in the form Shar.
        name: begins the ids.
        domain: of all cuts.
        audio_root: where relative paths of recordings start.
        out_dir: of the data directory.

    Raises:
        DataDirError: a manifest that cannot be used, or audio that is not there.
    """
    found: ExternalSorter[Entry] = ExternalSorter()
    custom: ExternalSorter[tuple[str, str]] = ExternalSorter()
    there: set[str] = set()
    audio = out_dir / "audio"
    out_dir.mkdir(parents=True, exist_ok=True)
    for cut in read_cuts(path):
        utt = utterance_id(name, cut.id)
        file, channel = audio_of(path, cut, audio_root, audio / small_folder(utt) / utt)
        if file not in there and not Path(file).is_file():
            raise DataDirError(
                f"{path}: cut '{cut.id}': its audio {file} is not there; if it moved, "
                "name the folder that paths start from by `audio_root` in the list, "
                "or correct the paths by lhotse's "
                "CutSet.with_recording_path_prefix"
            )
        there.add(file)
        # Ids of recordings are those of files: one each of some channels, or of a cut.
        recording = utterance_id(name, cut.recording_id)
        if len(cut.recording.sources) > 1:
            recording += f"-{cut.channel}"
        elif file.startswith(str(audio.absolute())):
            recording = utt
        speakers = {s.speaker for s in cut.supervisions if s.speaker}
        speaker = utterance_id(name, *speakers) if len(speakers) == 1 else utt
        texts = [s.text for s in cut.supervisions if s.text]
        text = " ".join(" ".join(texts).split()) or None
        segment = Segment(recording, cut.start, cut.end, channel)
        found.add(Entry(utt, file, speaker, domain, segment, text))
        if fields := custom_fields(cut):
            custom.add((utt, json.dumps(fields, default=str)))
    with table_writer(out_dir / CUSTOM) as table:
        for row in custom:
            table.add(*row)
    return found


def audio_of(
    path: Path, cut: Any, audio_root: Path, stem: Path
) -> tuple[str, int | None]:
    """Audio file of a cut, and the channel in it; None: the mean of all.

    Audio that is in the manifest is written to a file, which is named by ``stem``.

    Raises:
        DataDirError: a cut without recording, of some of its channels, or whose audio
            is no file.
    """
    if not cut.has_recording:
        raise DataDirError(
            f"{path}: cut '{cut.id}' has no recording; name cuts with audio, not only "
            "with features"
        )
    wanted = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    sources = [s for s in cut.recording.sources if set(wanted) & set(s.channels)]
    if len(sources) != 1 or (1 < len(wanted) < len(sources[0].channels)):
        raise DataDirError(
            f"{path}: cut '{cut.id}' has channels {wanted} of several or in several "
            "files; make a cut of each by lhotse's CutSet.to_mono"
        )
    (source,) = sources
    channel = None
    if len(wanted) < len(source.channels):
        channel = source.channels.index(wanted[0])
    if source.type == "file":
        return str((audio_root / source.source).absolute()), channel
    if source.type == "memory":
        suffix = SUFFIXES.get(source.source[:4], ".mp3")
        file = stem.with_name(short_id(stem.name) + suffix).absolute()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.source)
        return str(file), channel
    raise DataDirError(
        f"{path}: cut '{cut.id}': its audio is a {source.type}, which is not run or "
        "fetched here; write it to files by lhotse's CutSet.save_audios"
    )


def custom_fields(cut: Any) -> dict[str, Any]:
    """Custom fields of a cut and its supervisions, without arrays held in memory."""
    fields: dict[str, Any] = {}
    for key, value in (cut.custom or {}).items():
        if not getattr(value, "is_in_memory", False):
            fields[key] = value.to_dict() if hasattr(value, "to_dict") else value
    if cut.supervisions:
        fields["supervisions"] = [s.to_dict() for s in cut.supervisions]
    return fields
