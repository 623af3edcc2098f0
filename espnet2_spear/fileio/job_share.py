"""One job's share of a work in shards, when an array of jobs does it."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple


class JobShare(NamedTuple):
    """Every ``count``-th shard, beginning with number ``first`` (0 to count - 1)."""

    first: int = 0
    count: int = 1

    def has(self, shard: int) -> bool:
        """Whether a shard, numbered from 0, belongs to this part."""
        return shard % self.count == self.first


WHOLE_JOB = JobShare()


def parse_job_share(text: str) -> JobShare:
    """Read ``2/8``, the second of eight.

    Raises:
        argparse.ArgumentTypeError: anything else, also ``0/8`` and ``9/8``.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be like 2/8, the second of eight parts"
        )
    return JobShare(int(match[1]) - 1, int(match[2]))


def add_job_share_option(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option ``--part``."""
    parser.add_argument(
        "--part",
        type=parse_job_share,
        metavar="J/N",
        help="as job J of N do only its share of the shards, and leave the results to "
        "a run without this option, which finds the shards of all jobs done",
    )
