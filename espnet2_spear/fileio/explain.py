"""Errors of a command's input and of the file system, told in a line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

from espnet2_spear.fileio.tables import DataDirError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(main: Callable[[], None], *errors: type[Exception]) -> None:
    """Run the main function of a command; what users can mend ends it with a line.

    Args:
        main: to run.
        errors: of its own whose messages say what to do.

    Raises:
        SystemExit: the data contradict each other, or the file system refused
            something.
    """
    program = Path(sys.argv[0]).name
    try:
        main()
    except (DataDirError, *errors) as error:
        raise SystemExit(f"ERROR ({program}): {error}") from None
    except OSError as error:
        remedy = ""
        if error.errno in FULL:
            remedy = "; make room for its outputs (and temporary files beside them), "
            remedy += "and run it again: what is finished is kept"
        raise SystemExit(f"ERROR ({program}): {error}{remedy}") from error
