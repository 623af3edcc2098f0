"""Codes that an icefall recipe left in the cuts of lhotse, taken over for our data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from espnet2_spear.codes.targets import MAX_MISSING_ROWS
from espnet2_spear.constants import SAMPLE_RATE
from espnet2_spear.errors import UserError
from espnet2_spear.fileio.ark import SCP_COLUMNS, CodesWriter, write_missing_codes
from espnet2_spear.fileio.cuts import read_cuts, utterance_id
from espnet2_spear.fileio.external_sorter import ExternalSorter
from espnet2_spear.fileio.tables import Lines, join, rows, sorted_rows, table_writer

PIECE = re.compile(r"(.+)-(\d{7})-\d{7}")  # of a long utterance, by stage 1
UTTS_OF_AN_ARK = 1000  # which are in memory at once
COLUMNS = "utterance samples"
REMEDY = "name the cuts that the data directory was made from"


def utterances_of_cuts(lengths: Path) -> Lines:
    """Utterances that are made of every cut: itself, or the pieces of it.

    Args:
        lengths: ``utt2num_samples`` of the data directory.

    Returns:
        to be looked up by the utterance id of a cut: ids and samples, in turn.
    """
    with ExternalSorter[tuple[str, str]]() as found:
        for utt, samples, _ in sorted_rows(lengths, COLUMNS):
            found.add((utt, f"{utt} {samples}"))
            if piece := PIECE.fullmatch(utt):
                found.add((piece[1], f"{utt} {samples}"))
        groups = groupby(found, itemgetter(0))
        return Lines.of((cut, " ".join(v for _, v in group)) for cut, group in groups)


def codes_of(cut: Any, field: str) -> tuple[np.ndarray, float] | None:
    """Codes (T, N) from the start of a cut, and their rate in Hz; None: it has none.

    Raises:
        UserError: no array of times and codebooks, or of another length than the cut.
    """
    array = (cut.custom or {}).get(field)
    if array is None:
        return None
    where = f"cut '{cut.id}': {field}"
    if len(getattr(array, "shape", ())) != 2 or not hasattr(array, "frame_shift"):
        raise UserError(
            f"{where} is no TemporalArray of frames and codebooks; name another --field"
        )
    try:
        codes = array.array.load()
    except ImportError as error:
        raise UserError(
            f"{where} cannot be read ({error}): pip install -e '.[lhotse]', in a "
            "checkout"
        ) from None
    except (KeyError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where} is not in {array.array.storage_path} ({reason}); if the file "
            "moved, correct the paths in the cuts, or start where relative paths do"
        ) from None
    rate = 1 / array.frame_shift
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
    return None if (codes < 0).all() else (codes, rate)


def read_codes(
    sources: Iterable[tuple[str, Path]],
    field: str,
    lengths: Path,
    facts: dict[str, Any],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the utterances of a data directory that have codes, and these (T, N).

    Args:
        sources: names of corpora, and their cuts.
        field: of the cuts, which has the codes.
        lengths: ``utt2num_samples`` of the data directory.
        facts: gets ``frame_rate`` and, if it is not there yet, ``num_codebooks``.

    Raises:
        UserError: codes of several shapes or rates, or of another length than the
            utterance.
    """
    utterances = utterances_of_cuts(lengths)
    cuts = ((name, cut) for name, path in sources for cut in read_cuts(path))
    for name, cut in tqdm(cuts, unit=" cuts", disable=None):
        whole = utterance_id(name, cut.id)
        wanted = (utterances.find(whole) or "").split()
        found = codes_of(cut, field) if wanted else None
        if found is None:
            continue
        codes, rate = found
        facts.setdefault("frame_rate", round(rate, 6))
        width = facts.setdefault("num_codebooks", codes.shape[1])
        if codes.shape[1] != width or abs(rate - facts["frame_rate"]) > 1e-3:
            raise UserError(
                f"cut '{cut.id}': {field} has {codes.shape[1]} codebooks at {rate:g} "
                f"Hz, others or --quantizer {width} at {facts['frame_rate']:g} Hz; "
                "take over the codes of one quantizer at a time"
            )
        for utt, samples in zip(wanted[::2], wanted[1::2], strict=True):
            rows_wanted, part = int(samples) / SAMPLE_RATE * rate, codes
            if utt != whole and (piece := PIECE.fullmatch(utt)):
                first = round((int(piece[2]) / 100 - cut.start) * rate)
                part = codes[first : first + round(rows_wanted)]
            if abs(len(part) - rows_wanted) > MAX_MISSING_ROWS:
                raise UserError(
                    f"utterance '{utt}' lasts {rows_wanted / rate:g} s, its cut has "
                    f"{len(part)} rows of codes for it, at {rate:g} Hz; {REMEDY}"
                )
            yield utt, part


def take_over(
    sources: Iterable[tuple[str, Path]],
    field: str,
    data_dir: Path,
    scp: Path,
    codebook_size: int,
    num_codebooks: int | None = None,
) -> dict[str, Any]:
    """Write arks and the scp file of the codes of a data directory.

    Utterances without codes get the row of -1.

    Args:
        sources: names of corpora, and their cuts.
        field: of the cuts, which has the codes.
        data_dir: whose utterances are to have codes.
        scp: file to write; the arks lie in a folder of its name.
        codebook_size: K.
        num_codebooks: N; None: as the first cut has.

    Returns:
        what goes beside the codes: their shape, and how many there are.

    Raises:
        UserError: cuts or arrays that do not fit.
        DataDirError: cuts or a data directory that cannot be read.
    """
    facts: dict[str, Any] = {"codebook_size": codebook_size}
    if num_codebooks:
        facts["num_codebooks"] = num_codebooks
    lengths, folder = data_dir / "utt2num_samples", scp.with_name(scp.stem)
    scp.unlink(missing_ok=True)
    found = read_codes(sources, field, lengths, facts)
    frames = 0
    with ExternalSorter[tuple[str, str]]() as codes:
        for number in count():
            part = list(islice(found, UTTS_OF_AN_ARK))
            if not part:
                break
            ark, lines = (folder / f"codes.{number}.{kind}" for kind in ("ark", "scp"))
            try:
                with CodesWriter(ark, lines, codebook_size) as writer:
                    for utt, matrix in part:
                        writer.write(utt, matrix)
                        frames += len(matrix)
            except ValueError as error:
                raise UserError(
                    f"{error}; correct the cuts, or give another --codebook_size"
                ) from None
            for row in rows(lines, SCP_COLUMNS):
                codes.add(row[:2])
        if not (written := len(codes)):
            raise UserError(
                f"{data_dir}: no utterance of it has {field} in the cuts; give --cuts "
                "the name that the corpus has in --data_config"
            )
        missing = write_missing_codes(
            scp.with_name(f"{scp.stem}.missing.ark"), facts["num_codebooks"]
        )
        with table_writer(scp) as table:
            for utt, (_, row) in join(sorted_rows(lengths, COLUMNS), codes):
                table.add(utt, row[1] if row else missing)
    without = table.lines - written
    return {**facts, "frames": frames, "tokenized": written, "without": without}
