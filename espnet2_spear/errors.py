"""Errors that a user can mend."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input: the message names the file or option, the cause and the remedy.

    Commands end with it in one line, see :mod:`espnet2_spear.fileio.explain`.
    """


class CheckpointError(UserError):
    """A checkpoint that cannot be opened; the message names the file and remedy."""


def some(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Name the first few of many things in a message, and say how many more there are.

    Args:
        items: of any number.
        most: how many are named.
        separator: stands between them.
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
