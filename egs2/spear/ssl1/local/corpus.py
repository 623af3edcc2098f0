"""What the scripts data_<corpus>.py share: parts, checks, and their command line."""

import argparse
import csv
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from espnet2_spear.fileio.audio import AUDIO_SUFFIXES
from espnet2_spear.fileio.datadir import DataDir, DataDirError, combine, write_table

EXAMPLES = 3  # missing files that are named in a message


@dataclass
class Found:
    """What was found of a part of a corpus.

    Attributes:
        data: utterances; ids begin with the corpus' name and a hyphen.
        labels: utterance -> labels separated by spaces, for tagging; may be empty.
        missing: files that the corpus' own lists name and that are not there.
    """

    data: DataDir = field(default_factory=lambda: DataDir(wav_scp={}, utt2spk={}))
    labels: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def add(
        self,
        utt: str,
        path: Path,
        domain: str,
        speaker: str = "",
        text: str = "",
        labels: str = "",
    ) -> None:
        """Add an utterance that is a whole file.

        Raises:
            DataDirError: the id is there already.
        """
        if utt in self.data.wav_scp:
            raise DataDirError(
                f"{path} and {self.data.wav_scp[utt]} get the same id {utt}; keep one"
            )
        if not path.is_file():
            self.missing.append(str(path))
            return
        self.data.wav_scp[utt] = str(path.absolute())
        self.data.utt2spk[utt] = speaker or utt
        self.data.utt2domain[utt] = domain
        if text:
            self.data.text[utt] = text
        if labels:
            self.labels[utt] = labels


@dataclass(frozen=True)
class Corpus:
    """A corpus as it is published.

    Attributes:
        name: of the corpus; begins the utterance ids.
        read: (root, part) -> what is there; raises DataDirError where the layout is not
            the expected one.
        parts: part -> utterances in it as published, None where that is not known.
        default_parts: used unless others are asked for.
        licence: of the audio.
        source: where users get it.
        layout: expected content of the root folder.
        incomplete: whether copies usually miss files (videos that were deleted); the
            count is then only reported.
    """

    name: str
    read: Callable[[Path, str], Found]
    parts: Mapping[str, int | None]
    default_parts: Sequence[str]
    licence: str
    source: str
    layout: str
    incomplete: bool = False

    @property
    def variable(self) -> str:
        """Name of the variable in db.sh that holds the root folder."""
        return self.name.upper()

    def root(self, value: str | os.PathLike[str] | None) -> Path:
        """Return the root folder.

        Raises:
            DataDirError: not named or not there; says where to get the corpus.
        """
        how = (
            f"get it from {self.source} (licence: {self.licence}) and name its folder "
            f"by {self.variable} in db.sh; expected in it: {self.layout}"
        )
        if not value:
            raise DataDirError(f"{self.name}: its folder is not known; {how}")
        if not Path(value).is_dir():
            raise DataDirError(f"{value}: no such folder; {how}")
        return Path(value)

    def prepare(
        self, root: Path, parts: Sequence[str] = (), partial: bool = False
    ) -> Found:
        """Read and check parts of the corpus, and join them.

        Args:
            root: folder of the corpus.
            parts: names; the default ones if empty.
            partial: accept less than what was published.

        Raises:
            DataDirError: unknown part, unexpected layout, missing files, or another
                number of utterances than published.
        """
        found = []
        for part in parts or self.default_parts:
            if part not in self.parts:
                known = ", ".join(self.parts)
                raise DataDirError(f"{self.name} has no part '{part}'; it has: {known}")
            result = self.read(root, part)
            self._check(root, part, result, partial or self.incomplete)
            found.append(result)
        for result in found:
            result.data.path = root
        return Found(
            combine(result.data for result in found),
            {utt: labels for result in found for utt, labels in result.labels.items()},
            [path for result in found for path in result.missing],
        )

    def _check(self, root: Path, part: str, found: Found, partial: bool) -> None:
        count, published = len(found.data.utterances), self.parts[part]
        problem = ""
        if found.missing:
            names = ", ".join(found.missing[:EXAMPLES])
            problem = f"{len(found.missing)} listed files are missing, e.g. {names}"
        elif published is not None and count != published:
            problem = f"{count} utterances instead of {published}"
        if count == 0 or (problem and not partial):
            raise DataDirError(
                f"{root}: part '{part}' of {self.name}: {problem or 'no utterance'}; "
                f"expected: {self.layout}. Fetch what is missing from {self.source}, "
                "or accept it by `partial: true` in the YAML list (--partial here)"
            )
        if problem:
            logging.warning("%s %s: %s", self.name, part, problem)

    def main(self, cmd: list[str] | None = None) -> None:
        """Command line of data_<corpus>.py."""
        parser = argparse.ArgumentParser(
            description=f"Prepare {self.name} ({self.licence}; {self.source}) as a "
            f"data directory. Its folder: {self.layout}."
        )
        parser.add_argument("--root", default=os.environ.get(self.variable))
        parser.add_argument("--out_dir", type=Path, required=True)
        parser.add_argument(
            "--parts",
            nargs="+",
            default=list(self.default_parts),
            help=f"of {', '.join(self.parts)}",
        )
        parser.add_argument("--partial", action="store_true", help="accept less")
        args = parser.parse_args(cmd)
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
        try:
            found = self.prepare(self.root(args.root), args.parts, args.partial)
            write(found, args.out_dir)
        except DataDirError as error:
            raise SystemExit(f"ERROR (data_{self.name}.py): {error}") from None
        logging.info("%s: %d utterances", args.out_dir, len(found.data.utterances))


def write(found: Found, out_dir: Path) -> None:
    """Write a data directory, with `labels` where there are any."""
    found.data.validate(require=("utt2domain",))
    found.data.write(out_dir)
    if found.labels:
        write_table(out_dir / "labels", found.labels)


def needed(path: Path, layout: str) -> Path:
    """Return a path that has to exist.

    Raises:
        DataDirError: it does not.
    """
    if not path.exists():
        raise DataDirError(f"{path}: not there; expected: {layout}")
    return path


def audio_files(folder: Path) -> Iterator[Path]:
    """Yield the audio files below a folder, sorted; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
            yield path


def read_csv(path: Path, fields: Sequence[str] | None = None) -> Iterator[dict]:
    """Yield the rows of a CSV file; lines that begin with # are left out.

    Args:
        path: of the file.
        fields: names of the columns, where the first row does not give them.

    Raises:
        DataDirError: a row with too few columns.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = (line for line in file if not line.startswith("#"))
        for row in csv.DictReader(lines, fields, skipinitialspace=True):
            if None in row.values():
                raise DataDirError(
                    f"{path}: a row with too few columns, {list(row.values())}; fetch "
                    "the file again"
                )
            yield row
