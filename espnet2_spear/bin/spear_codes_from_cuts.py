#!/usr/bin/env python3
"""Take over codes that an icefall recipe left in the cuts of lhotse.

The codes of a field (codebook_indexes; wavlm_ or dasheng_codebook_indexes where there
are two teachers) become those of a data directory, which stage 7 reads: NAME.scp and
NAME.json as of spear_tokenize. Utterances without codes get the row of -1.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from espnet2_spear.codes.targets import MAX_MISSING_ROWS
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.ark import SCP_COLUMNS, CodesWriter, write_missing_codes
from espnet2_spear.fileio.atomic import write_atomically
from espnet2_spear.fileio.cuts import read_cuts, utterance_id
from espnet2_spear.fileio.explain import main_with_one_line_errors
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.tables import (
    DataDirError,
    Lines,
    join,
    rows,
    sorted_rows,
    table_writer,
)
from espnet2_spear.mvq.files import load_quantizer

PIECE = re.compile(r"(.+)-(\d{7})-(\d{7})")  # of a long utterance, by stage 1
UTTS_OF_AN_ARK = 10_000


class Wanted(NamedTuple):
    """An utterance of the data directory.

    Attributes:
        utt: its id.
        start: in its recording, seconds; None: where the cut starts.
        seconds: its length.
    """

    utt: str
    start: float | None
    seconds: float


class Wants:
    """Utterances of a data directory, by the cuts that they are made of.

    In memory are the pieces of long ones.
    """

    def __init__(self, data_dir: Path) -> None:
        table = data_dir / "utt2num_samples"
        self._lines = Lines.by_key(table, "utterance samples")
        self._pieces: dict[str, list[Wanted]] = defaultdict(list)
        for utt, samples, _ in sorted_rows(table, "utterance samples"):
            if piece := PIECE.fullmatch(utt):
                seconds = int(samples) / SAMPLE_RATE
                start = int(piece[2]) / 100
                self._pieces[piece[1]].append(Wanted(utt, start, seconds))

    def of(self, utt: str) -> list[Wanted]:
        """What to make of a cut: itself, its pieces, or nothing."""
        if samples := self._lines.find(utt):
            return [Wanted(utt, None, int(samples) / SAMPLE_RATE)]
        return self._pieces.get(utt, [])


class CutCodes:
    """Reads the codes of cuts, all of one shape.

    Args:
        field: of the cuts.
        num_codebooks: N; None: as the first cut has.

    Attributes:
        num_codebooks: N.
        frame_rate: frames per second, of the first cut.
    """

    def __init__(self, field: str, num_codebooks: int | None) -> None:
        self.field, self.num_codebooks = field, num_codebooks
        self.frame_rate: float | None = None

    def read(self, cut: Any) -> np.ndarray | None:
        """Codes (T, N) from the start of the cut; None: it has none.

        Raises:
            UserError: no array of times and codebooks, of another length than the cut,
                or of another width or rate than those before.
        """
        array = (cut.custom or {}).get(self.field)
        if array is None:
            return None
        where = f"cut '{cut.id}': {self.field}"
        if len(getattr(array, "shape", ())) != 2 or not hasattr(array, "frame_shift"):
            raise UserError(
                f"{where} is no TemporalArray of frames and codebooks; name another "
                "--field"
            )
        rate = 1 / array.frame_shift
        if self.frame_rate is None:
            self.frame_rate = round(rate, 6)
            self.num_codebooks = self.num_codebooks or array.shape[1]
        if array.shape[1] != self.num_codebooks or abs(rate - self.frame_rate) > 1e-3:
            raise UserError(
                f"{where} has {array.shape[1]} codebooks at {rate:g} Hz, others or "
                f"--quantizer {self.num_codebooks} at {self.frame_rate:g} Hz; take "
                "over the codes of one quantizer at a time"
            )
        codes = self._load(array, where)
        expected = cut.duration * rate
        # A cut of a longer one; else, as in the authors' loader, the array starts with
        # the cut whatever it says.
        if len(codes) > expected + MAX_MISSING_ROWS and cut.start >= array.start:
            first = round((cut.start - array.start) * rate)
            codes = codes[first : first + round(expected)]
        if abs(len(codes) - expected) > MAX_MISSING_ROWS:
            raise UserError(
                f"{where} has {len(codes)} rows for {cut.duration:g} s, about "
                f"{expected:.0f} expected: it is of another cut, perhaps of a copy of "
                "another speed; make the array again, or remove the cut"
            )
        return None if (codes < 0).all() else codes

    @staticmethod
    def _load(array: Any, where: str) -> np.ndarray:
        try:
            return array.array.load()
        except (ImportError, KeyError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{where} is not in {array.array.storage_path} ({reason}); if the file "
                "moved, correct the paths in the cuts, or start where relative paths do"
            ) from None


def rows_of(codes: np.ndarray, cut: Any, wanted: Wanted, rate: float) -> np.ndarray:
    """Rows of an utterance, a cut or a piece of it.

    Raises:
        UserError: the utterance has another length.
    """
    if wanted.start is not None:
        first = round((wanted.start - cut.start) * rate)
        codes = codes[first : first + round(wanted.seconds * rate)]
    if abs(len(codes) - wanted.seconds * rate) > MAX_MISSING_ROWS:
        raise UserError(
            f"utterance '{wanted.utt}' lasts {wanted.seconds:g} s, its cut has "
            f"{len(codes)} rows of codes for it, at {rate:g} Hz; name the cuts that "
            "the data directory was made from"
        )
    return codes


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--cuts",
        required=True,
        action="append",
        metavar="NAME=PATH",
        help="name of the corpus in --data_config, and its cuts; once for each",
    )
    parser.add_argument("--field", default="codebook_indexes")
    parser.add_argument(
        "--quantizer",
        type=Path,
        help="file of the quantizer that made them, ours or icefall's; without it the "
        "codes have no identity that a training could compare",
    )
    parser.add_argument(
        "--codebook_size", type=int, default=256, help="without --quantizer"
    )
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="such as dump/raw/train"
    )
    parser.add_argument("--scp", type=Path, required=True, help="file to write")
    return parser


def main(cmd: list[str] | None = None) -> None:
    """Convert; see ``--help``.

    Raises:
        UserError: cuts or arrays that do not fit.
    """
    main_with_one_line_errors(get_parser(), run, cmd)


def run(args: argparse.Namespace) -> None:
    """Write the codes of one field for one data directory."""
    quantizer = args.quantizer and load_quantizer(args.quantizer)
    size = quantizer.codebook_size if quantizer else args.codebook_size
    reader = CutCodes(args.field, quantizer and quantizer.num_codebooks)
    wants = Wants(args.data_dir)
    folder, name = args.scp.parent, args.scp.stem
    args.scp.unlink(missing_ok=True)
    found = read_codes(args.cuts, wants, reader)
    frames = 0
    with ExternalSorter[tuple[str, str]]() as codes:
        for part, number in write_arks(found, folder / name, size):
            frames += number
            for row in rows(part, SCP_COLUMNS):
                codes.add(row[:2])
        if not (written := len(codes)):
            raise UserError(
                f"{args.data_dir}: no utterance of it has {args.field} in the cuts; "
                "give --cuts the name that the corpus has in --data_config"
            )
        missing = write_missing_codes(
            folder / f"{name}.missing.ark", reader.num_codebooks
        )
        everyone = sorted_rows(args.data_dir / "utt2num_samples", "utterance samples")
        with table_writer(args.scp) as scp:
            for utt, (_, row) in join(everyone, codes):
                scp.add(utt, row[1] if row else missing)
        without = scp.lines - written
    facts = {
        "cuts": args.cuts,
        "field": args.field,
        "quantizer": args.quantizer and str(args.quantizer),
        "quantizer_id": quantizer and quantizer.identity,
        "frame_rate": reader.frame_rate,
        "num_codebooks": reader.num_codebooks,
        "codebook_size": size,
        "frames": frames,
        "tokenized": written,
        "without": without,
    }
    known = {key: value for key, value in facts.items() if value is not None}
    text = json.dumps(known, indent=1) + "\n"
    write_atomically(args.scp.with_suffix(".json"), text.encode())
    logging.info(f"{args.scp}: codes of {written} utterances, {without} without any")


def read_codes(
    sources: list[str], wants: Wants, reader: CutCodes
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield utterances of the data directory with their codes."""
    for source in sources:
        name, equals, path = source.partition("=")
        if not (name and equals and Path(path).exists()):
            raise DataDirError(
                f"--cuts {source}: expected NAME=PATH, of a file or folder"
            )
        for cut in tqdm(read_cuts(Path(path)), unit=" cuts", disable=None):
            wanted = wants.of(utterance_id(name, cut.id))
            codes = reader.read(cut) if wanted else None
            if codes is not None:
                for each in wanted:
                    yield each.utt, rows_of(codes, cut, each, reader.frame_rate)


def write_arks(
    found: Iterator[tuple[str, np.ndarray]], folder: Path, codebook_size: int
) -> Iterator[tuple[Path, int]]:
    """Write arks of so many utterances; yields their scp files and their frames."""
    for number in count():
        part = islice(found, UTTS_OF_AN_ARK)
        first = next(part, None)
        if first is None:
            return
        ark, scp = (folder / f"codes.{number}.{kind}" for kind in ("ark", "scp"))
        frames = 0
        with CodesWriter(ark, scp, codebook_size) as writer:
            for utt, codes in chain([first], part):
                try:
                    writer.write(utt, codes)
                except ValueError as error:
                    raise UserError(
                        f"{error}; correct the cuts, or give another --codebook_size"
                    ) from None
                frames += len(codes)
        yield scp, frames


if __name__ == "__main__":
    main()
