"""What the scripts data_<corpus>.py share: parts, checks, and their command line."""

import argparse
import csv
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote_from_bytes

from espnet2_spear.fileio.datadir import Entry, Segment, write_entries
from espnet2_spear.fileio.explain import command
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.folders import audio_files
from espnet2_spear.fileio.tables import DataDirError, Lines, open_text

EXAMPLES = 3  # missing files that are named in a message
LEAST = 0.5  # share of a part that copies have at least that usually miss files
# Share by which segments may last longer or shorter than published: hours are published
# in round numbers, and some segments are left out here (those without speech).
TOLERANCE = 0.1


class Found:
    """What was found of a part of a corpus; its utterances are sorted on disk.

    Ids of utterances and recordings begin with the corpus' name and a hyphen.

    Attributes:
        entries: the utterances, read in the order of their ids.
        missing: how many files the corpus' own lists name that are not there.
        recordings: how many of them there are, where a script counts them.
        seconds: of the segments; whole files, and segments to the end of a recording,
            count nothing, as their lengths are not known before they are opened.
        examples: some of them.
    """

    def __init__(self) -> None:
        self.entries: ExternalSorter[Entry] = ExternalSorter()
        self.missing = self.recordings = 0
        self.seconds = 0.0
        self.examples: list[str] = []
        self._there: dict[str, bool] = {}  # of each recording with segments

    def add(
        self,
        utt: str,
        path: Path,
        domain: str,
        speaker: str = "",
        text: str = "",
        labels: str = "",
    ) -> None:
        """Add an utterance that is a whole file, or count it as missing."""
        if path.is_file():
            file, speaker = str(path.absolute()), speaker or utt
            self.entries.add(
                Entry(utt, file, speaker, domain, text=text or None, labels=labels)
            )
        else:
            self.miss(path)

    def add_segment(
        self, utt: str, path: Path, segment: Segment, speaker: str, text: str = ""
    ) -> None:
        """Add a piece of a recording of speech, or count the recording as missing."""
        file = str(path.absolute())
        if file not in self._there:
            self._there[file] = path.is_file()
            if not self._there[file]:
                self.miss(path)
        if self._there[file]:
            entry = Entry(utt, file, speaker, "speech", segment, text or None)
            self.entries.add(entry)
            self.seconds += max(segment.end - segment.start, 0.0)

    def miss(self, path: Path | str) -> None:
        """Count a file that is not there."""
        self.missing += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(path))


class FileIndex:
    """The audio files below a folder, by their names without suffix.

    Args:
        folder: to search; hidden files are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Names may have white space in them, which keys of tables have not.
        with ExternalSorter[tuple[str, str]]() as files:
            for path in audio_files(folder):
                files.add((quote_from_bytes(os.fsencode(path.stem)), str(path)))
            groups = groupby(files, key=itemgetter(0))
            self._lines = Lines.of((name, max(group)[1]) for name, group in groups)

    def find(self, stem: str) -> Path | None:
        """The file of a name; the last one in sorted order, if there are several."""
        found = self._lines.find(quote_from_bytes(os.fsencode(stem)))
        return Path(found) if found else None

    def path(self, stem: str, suffix: str) -> Path:
        """The file of a name, or where one of this suffix should be."""
        return self.find(stem) or self.folder / f"{stem}{suffix}"


@dataclass(frozen=True)
class Corpus:
    """A corpus as it is published.

    Attributes:
        name: of the corpus; begins the utterance ids.
        read: (root, part, found) adds to `found` what is there; raises
            FileNotFoundError where the layout is not the expected one.
        parts: part -> utterances in it as published, None where that is not known.
        licence: of the audio.
        source: where users get it.
        layout: expected content of the root folder.
        default_parts: used unless others are asked for; all where none is named.
        hours: part -> hours of its segments as published, where that is known.
        recordings: part -> number of its recordings as published, where that is known
            and `read` counts them.
        incomplete: whether copies usually miss files (videos that were deleted); what
            is missing is then only reported, up to half of a part.
        more_parts: pattern of names of further parts, of which nothing is known.
    """

    name: str
    read: Callable[[Path, str, Found], None]
    parts: Mapping[str, int | None]
    licence: str
    source: str
    layout: str
    default_parts: Sequence[str] = ()
    hours: Mapping[str, float] = field(default_factory=dict)
    recordings: Mapping[str, int] = field(default_factory=dict)
    incomplete: bool = False
    more_parts: str = ""

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
        self,
        root: Path,
        parts: Sequence[str] = (),
        partial: bool = False,
        keep_parts: bool = False,
    ) -> Found:
        """Read and check parts of the corpus, and join them.

        Args:
            root: folder of the corpus.
            parts: names; the default ones if empty.
            partial: accept less than what was published.
            keep_parts: every utterance tells its part.

        Raises:
            DataDirError: unknown part, unexpected layout, missing files, or another
                number of utterances or recordings, or other hours, than published.
        """
        found = Found()
        for part in parts or self.default_parts or self.parts:
            if part not in self.parts and not re.fullmatch(self.more_parts, part):
                known = ", ".join(self.parts)
                raise DataDirError(f"{self.name} has no part '{part}'; it has: {known}")
            result = Found()
            try:
                self.read(root, part, result)
            except FileNotFoundError as error:
                raise DataDirError(
                    f"{error.filename}: not there; expected: {self.layout}"
                ) from None
            except KeyError as error:
                raise DataDirError(
                    f"{root}: a list of '{part}' has no {error}; fetch it again; "
                    f"expected: {self.layout}"
                ) from None
            self._check(root, part, result, partial)
            for entry in result.entries:
                found.entries.add(entry._replace(part=part) if keep_parts else entry)
            found.missing += result.missing
            result.entries.close()
        return found

    def _check(self, root: Path, part: str, found: Found, partial: bool) -> None:
        count, published = len(found.entries), self.parts.get(part)
        problem = ""
        if found.missing:
            names = ", ".join(found.examples)
            problem = f"{found.missing} listed files are missing, e.g. {names}"
        elif published is not None and count != published:
            problem = f"{count} utterances instead of {published}"
        elif found.recordings != self.recordings.get(part, found.recordings):
            published = self.recordings[part]
            problem = f"{found.recordings} recordings instead of {published}"
        elif part in self.hours:
            hours, expected = found.seconds / 3600, self.hours[part]
            if abs(hours - expected) > TOLERANCE * expected:
                problem = f"{hours:.1f} hours of segments instead of {expected:g}"
        accepted = partial
        if self.incomplete and not partial:
            whole = published or count + found.missing
            accepted = count >= LEAST * whole
            if not accepted:
                problem += f"; only {count} of {whole} utterances are there"
        if count == 0 or (problem and not accepted):
            raise DataDirError(
                f"{root}: part '{part}' of {self.name}: {problem or 'no utterance'}; "
                f"expected: {self.layout}. Fetch what is missing from {self.source}, "
                "or accept it by `partial: true` in the YAML list (--partial here)"
            )
        if problem:
            logging.warning("%s %s: %s", self.name, part, problem)

    def main(self, cmd: list[str] | None = None) -> None:
        """Command line of data_<corpus>.py; what users can mend ends it with a line."""
        parser = argparse.ArgumentParser(
            description=f"Prepare {self.name} ({self.licence}; {self.source}) as a "
            f"data directory. Its folder: {self.layout}."
        )
        parser.add_argument("--root", default=os.environ.get(self.variable))
        parser.add_argument("--out_dir", type=Path, required=True)
        parser.add_argument(
            "--parts",
            nargs="+",
            default=[*(self.default_parts or self.parts)],
            help=f"of {', '.join(self.parts)}",
        )
        parser.add_argument("--partial", action="store_true", help="accept less")
        command(lambda: parser)(self._run)(cmd)

    def _run(self, args: argparse.Namespace) -> None:
        # A table `splits` for those who test on the corpus' own parts.
        found = self.prepare(
            self.root(args.root), args.parts, args.partial, len(args.parts) > 1
        )
        count = write_entries(found.entries, args.out_dir)
        logging.info("%s: %d utterances", args.out_dir, count)


def list_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a list, which may be packed by gzip, with their ends.

    Raises:
        FileNotFoundError: there is no such file.
        DataDirError: it is cut off, cannot be read, or is no UTF-8.
    """
    try:
        with open_text(path, newline="") as file:
            yield from file
    except FileNotFoundError:
        raise
    except (EOFError, OSError) as error:
        raise DataDirError(f"{path}: broken ({error}); fetch it again") from None


def read_csv(
    path: Path, fields: Sequence[str] | None = None, delimiter: str = ","
) -> Iterator[dict]:
    """Yield the rows of a CSV file; lines that begin with # are left out.

    Args:
        path: of the file.
        fields: names of the columns, where the first row does not give them.
        delimiter: between columns.

    Raises:
        FileNotFoundError: there is no such file.
        DataDirError: a row with too few columns, or a file that cannot be read.
    """
    lines = (line for line in list_lines(path) if not line.startswith("#"))
    rows = csv.DictReader(lines, fields, delimiter=delimiter, skipinitialspace=True)
    for row in rows:
        if None in row.values():
            raise DataDirError(
                f"{path}: a row with too few columns, {list(row.values())}; fetch the "
                "file again"
            )
        yield row


def label(text: str) -> str:
    """A class' name as a label: _ in place of spaces and commas."""
    return "_".join(text.replace(",", " ").split())
