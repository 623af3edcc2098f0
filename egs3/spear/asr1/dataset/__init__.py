"""Kaldi data directories as ESPnet3's data set."""

from pathlib import Path

from espnet3.components.data.base_dataset import BaseDataset
from espnet3.contract import Field

from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.fileio.audio import AudioError, Span, read_pieces


def _read(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line.strip())


class Dataset(BaseDataset):
    """Utterances of a folder with ``wav.scp`` and ``text``; 16 kHz, one channel.

    The audio lies in files or in arks (``file.ark:offset``).

    Args:
        folder: the data directory.

    Raises:
        ValueError: transcripts without audio; when read, audio of another form or in
            another scale than [-1, 1], or that is not there.
    """

    fields = (Field("speech", "audio"), Field("text", "text"))

    def __init__(self, folder: str) -> None:
        self.audio = _read(Path(folder) / "wav.scp")
        self.text = _read(Path(folder) / "text")
        self.utterances = sorted(self.text)
        missing = [utt for utt in self.utterances if utt not in self.audio]
        if missing:
            raise ValueError(f"{folder}/wav.scp lacks {missing[:3]} of {folder}/text")

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, object]:
        utt = self.utterances[int(index)]
        ((speech, info),) = read_pieces(self.audio[utt], [Span()])
        if isinstance(speech, AudioError):
            raise speech
        if (info.rate, info.channels) != (SAMPLE_RATE, 1):
            raise ValueError(
                f"{self.audio[utt]}: {info.rate} Hz and {info.channels} channels; "
                f"{SAMPLE_RATE} Hz and one channel are needed: python -m "
                "espnet2_spear.bin.spear_format converts a data directory"
            )
        return {"speech": speech, "text": self.text[utt]}
