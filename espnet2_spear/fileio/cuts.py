"""Cuts of lhotse: manifests (cuts.jsonl.gz) and folders in the form Shar."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.names import safe_id
from espnet2_spear.fileio.tables import DataDirError


def read_cuts(path: Path) -> Iterator[Any]:
    """Yield cuts, lhotse's ``MonoCut`` or ``MultiCut``, in the order of the file.

    Those whose audio lhotse would change while it reads it, such as copies of another
    speed, are left out and counted: codes are those of the audio as it is. Another rate
    is no change; audio is resampled here, too.

    Raises:
        UserError: lhotse is not installed.
        DataDirError: no such manifest, a broken one, cuts that lhotse would mix, or
            none that it would leave as they are.
    """
    try:
        from lhotse import CutSet
        from lhotse.cut.data import DataCut
    except ImportError:
        raise UserError(
            f"{path}: cuts are read by lhotse: pip install -e '.[lhotse]' in a checkout"
        ) from None
    number, changed, first = 0, 0, ""
    try:
        cuts = (
            CutSet.from_shar(in_dir=path) if path.is_dir() else CutSet.from_file(path)
        )
        for cut in cuts:
            number += 1
            if not isinstance(cut, DataCut):
                raise DataDirError(
                    f"{path}: cut '{cut.id}' is a {type(cut).__name__}, whose audio is "
                    "in no file; write it by lhotse's CutSet.save_audios first"
                )
            if changes(cut):
                changed += 1
                first = first or f"'{cut.id}': {', '.join(changes(cut))}"
            else:
                yield cut
    except DataDirError:
        raise
    except (
        AssertionError,
        EOFError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataDirError(
            f"{path}: broken behind cut {number} ({reason}); name a cuts.jsonl.gz or a "
            "folder in the form Shar, or write it again"
        ) from None
    if changed:
        left_out = (
            f"{path}: {changed} of {number} cuts are changed copies ({first}, ...)"
        )
        if changed == number:
            raise DataDirError(f"{left_out}; name the cuts of the audio as it is")
        logging.warning(f"{left_out}, which are left out")


def changes(cut: Any) -> list[str]:
    """Names of what lhotse would do to a cut's audio, beside resampling."""
    transforms = (cut.recording.transforms or []) if cut.has_recording else []
    names = [t["name"] if isinstance(t, dict) else type(t).__name__ for t in transforms]
    return [name for name in names if name != "Resample"]


def utterance_id(name: str, cut_id: str) -> str:
    """Id of a cut's utterance in the corpus of this name."""
    return f"{name}-{safe_id(cut_id)}"
