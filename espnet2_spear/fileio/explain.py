"""Frame of a command: options, logging, errors told in one line."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from espnet2_spear.errors import UserError

LOG_FORMAT = "%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


class _HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Lines of the description as they are, options with their defaults."""


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of which ``--help`` shows a description and all defaults."""
    return argparse.ArgumentParser(
        description=description, formatter_class=_HelpFormatter
    )


def add_switch(parser: argparse._ActionsContainer, name: str, help: str) -> None:
    """Give a parser an option that is false unless ``true`` is given, as ESPnet's."""
    from espnet2.utils.types import str2bool

    help += " (true or false)"
    parser.add_argument(name, type=str2bool, default=False, help=help)


def add_options(parser: argparse._ActionsContainer, **defaults: Any) -> None:
    """Give a parser options that their names explain, each of its default's type."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)


def add_batch_options(parser: argparse.ArgumentParser, batch_seconds: float) -> None:
    """Give a parser the options of a network that works through audio in batches."""
    parser.add_argument(
        "--batch_seconds",
        type=float,
        default=batch_seconds,
        help="audio in a batch, padding included",
    )
    parser.add_argument(
        "--shard_seconds", type=float, default=600.0, help="audio in an output file"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--num_threads", type=int, default=0, help="0 for torch's own choice"
    )


def read_options(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> argparse.Namespace:
    """Read the command line of what is run later.

    Raises:
        ValueError: options that it does not know, or impossible values.
    """

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse
    return parser.parse_args(words)


def command(
    get_parser: Callable[[], argparse.ArgumentParser], *errors: type[Exception]
) -> Callable[[Callable[[argparse.Namespace], T]], Callable[..., T]]:
    """Make a function of options the ``main`` of a command, which takes its words.

    ``main()`` takes the words of the process, which then ends with one line where users
    can mend an error; ``main(words)`` is for callers in Python, to whom errors are
    raised as they are. Every command has ``--log_level``.

    Args:
        get_parser: returns the parser of the options.
        errors: further classes whose messages say what to do.
    """

    def decorate(run: Callable[[argparse.Namespace], T]) -> Callable[..., T]:
        @wraps(run)
        def main(cmd: list[str] | None = None) -> T:
            parser = get_parser()
            parser.add_argument(
                "--log_level", type=str.upper, choices=LOG_LEVELS, default="INFO"
            )
            args = parser.parse_args(cmd)
            logging.basicConfig(level=args.log_level, format=LOG_FORMAT)
            if cmd is not None:
                return run(args)
            program = Path(sys.argv[0]).name
            try:
                return run(args)
            except (UserError, *errors) as error:
                raise SystemExit(f"ERROR ({program}): {error}") from None
            except OSError as error:
                remedy = ""
                if error.errno in FULL:
                    remedy = (
                        "; make room for its outputs (and for temporary files beside "
                        f"them and in {tempfile.gettempdir()}, which TMPDIR changes), "
                        "and run it again: what is finished is kept"
                    )
                message = f"ERROR ({program}): {error}{remedy}"
                raise SystemExit(message) from error

        return main

    return decorate


def some(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Name the first few of many things in a message, and say how many more there are.

    Args:
        items: of any number.
        most: how many are named.
        separator: stands between them.
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
