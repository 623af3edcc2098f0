"""The base of all errors that a user can mend."""


class UserError(ValueError):
    """Bad input: the message names the file or option, the cause and the remedy.

    Commands end with it in one line, see :mod:`espnet2_spear.fileio.explain`.
    """
