"""Errors that a user can mend."""


class UserError(ValueError):
    """Bad input: the message names the file or option, the cause and the remedy.

    Commands end with it in one line, see :mod:`espnet2_spear.fileio.explain`.
    """


class CheckpointError(UserError):
    """A checkpoint that cannot be opened; the message names the file and remedy."""
