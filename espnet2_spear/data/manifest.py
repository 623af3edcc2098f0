"""A memory-mapped index of the lists of a training: what any row is, in no time.

A manifest is a folder of

* ``samples.npy`` int32 (rows,): lengths; rows are sorted by group, then by length;
* ``<name>.npy`` int64 (rows,) for every list: the byte at which the row's line begins;
* ``manifest.json``: the lists with their sizes and times, and the groups; the last.

A group is the part of a corpus that belongs to one domain, so that neither is stored
per row, and a span of lengths within a group is a span of rows. Ids and paths stay in
the lists, which are mapped as well.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.datadir import parse_count
from espnet2_spear.fileio.hashes import digest_of
from espnet2_spear.fileio.tables import (
    DataDirError,
    Lines,
    difference_of,
    join,
    open_table,
    sorted_rows,
)

INDEX = "manifest.json"
FORMAT = "espnet2_spear.iterators.Manifest 1"
OTHERS = ""  # corpus of utterances whose corpus has no weight of its own


@dataclass(frozen=True)
class Group:
    """Rows of one corpus and domain.

    Attributes:
        corpus: its name, or ``OTHERS``.
        domain: its name.
        first: first row.
        last: last row + 1.
        samples: sum of their lengths.
    """

    corpus: str
    domain: str
    first: int
    last: int
    samples: int


@dataclass(frozen=True)
class Lists:
    """Files that a manifest is made of.

    Attributes:
        lengths: ``utterance samples``; says which utterances there are.
        domain: ``utterance domain``.
        files: data name -> list of ``utterance file``, such as wav.scp; they may hold
            more utterances than ``lengths``.
    """

    lengths: str
    domain: str
    files: Mapping[str, str]

    def facts(self) -> dict[str, dict[str, Any]]:
        """Path, size and time of each file: what shows that one has changed.

        Raises:
            DataDirError: a file that is not there.
        """
        paths = {"lengths": self.lengths, "domain": self.domain, **self.files}
        facts = {}
        for name, path in paths.items():
            with open_table(Path(path)) as file:
                stat = os.fstat(file.fileno())
            facts[name] = {
                "path": os.path.abspath(path),
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
            }
        return facts


class Manifest:
    """The utterances of a training, by row.

    Can be sent to other processes; each maps the files itself.

    Args:
        folder: as :func:`open_manifest` makes it.

    Attributes:
        samples: int32 (rows,), memory-mapped.
        groups: the groups, in the order of their rows.

    Raises:
        DataDirError: a missing or damaged file of the manifest, or a list that is gone.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.groups = [Group(**group) for group in content["groups"]]
            self.files = {name: content["lists"][name] for name in content["files"]}
            self.samples = self._load("samples")
            self._places = {name: self._load(name) for name in self.files}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataDirError(
                f"{path}: missing or damaged ({error!r}); remove the folder, and it is "
                "made again"
            ) from error
        self._lists = {n: Lines(facts["path"]) for n, facts in self.files.items()}
        for name, facts in self.files.items():
            if self._lists[name].size != facts["size"]:
                raise DataDirError(
                    f"{facts['path']}: has another size since the training began; "
                    "start again with --resume true"
                )

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self.samples)

    def group(self, row: int) -> Group:
        """The group that a row belongs to."""
        return next(group for group in self.groups if row < group.last)

    def entry(self, row: int) -> tuple[str, dict[str, str]]:
        """An utterance's id, and what each list says of it.

        Raises:
            DataDirError: lists that disagree, because one was changed in place while it
                was in use.
        """
        utt, values = None, {}
        for name, places in self._places.items():
            key, value = self._lists[name].at(int(places[row]))
            if utt not in (None, key):
                raise DataDirError(
                    f"{self.files[name]['path']}: changed during the training ('{key}' "
                    f"instead of '{utt}'); start again with --resume true"
                )
            utt, values[name] = key, value
        return utt, values


def open_manifest(
    folder: str | os.PathLike[str],
    lists: Lists,
    domains: Sequence[str],
    corpora: Sequence[str] = (),
) -> Manifest:
    """Open the manifest of some lists; it is built unless it is there already.

    The folder may hold those of several sets of lists, each in a subfolder named by a
    hash of what it was made of, which appears complete or not at all. Of the processes
    of a machine that come at once, one builds and the others wait; machines that share
    the folder may build twice, and one of the results is used.

    Args:
        folder: made if it is not there.
        lists: the lists.
        domains: names that may appear in the list of domains.
        corpora: corpora that have groups of their own. The utterances of a corpus have
            ids that begin with its name and a hyphen.

    Raises:
        DataDirError: a list that is missing, malformed, or lacks utterances; a domain
            that is unknown; utterances of none of the corpora.
    """
    folder = Path(folder)
    facts = lists.facts()
    identity = {
        "format": FORMAT,
        "lists": facts,
        "files": sorted(lists.files),
        "domains": list(domains),
        "corpora": sorted(corpora),
    }
    target = folder / digest_of(identity)[:16]
    if not (target / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # lost when the process ends, however
            except OSError as error:
                raise DataDirError(
                    f"{lock.name}: cannot be locked ({error}); mount the disk with "
                    "locks, or name a --manifest_dir on another"
                ) from error
            if not (target / INDEX).exists():
                _build_at(target, lists, identity)
    return Manifest(target)


def _build_at(target: Path, lists: Lists, identity: Mapping[str, Any]) -> None:
    start = time.perf_counter()
    part = target.with_name(f".building-{socket.gethostname()}")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        groups = _build(part, lists, identity["domains"], identity["corpora"])
        if lists.facts() != identity["lists"]:
            raise DataDirError(
                f"{target}: a list was changed while it was read; start again"
            )
        content = {**identity, "groups": [asdict(group) for group in groups]}
        write_json(part / INDEX, content)
        try:
            part.rename(target)
        except OSError:
            if not (target / INDEX).exists():  # by another machine
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    logging.info(
        f"{target}: made of {groups[-1].last} utterances in "
        f"{time.perf_counter() - start:.1f} s"
    )


def _build(
    folder: Path, lists: Lists, domains: Sequence[str], corpora: Sequence[str]
) -> list[Group]:
    lengths, domain = Path(lists.lengths), Path(lists.domain)
    files = {name: Path(path) for name, path in lists.files.items()}
    samples, groups = array("i"), array("q")
    places = {name: array("q") for name in files}
    corpus_of = {f"{name}-": number for number, name in enumerate(corpora, 1)}
    for utt, (length, kind, *found) in join(
        sorted_rows(lengths, "utterance samples"),
        sorted_rows(domain, "utterance domain"),
        *(sorted_rows(path, "utterance file") for path in files.values()),
    ):
        if length is None:
            continue
        for path, row in zip((domain, *files.values()), (kind, *found), strict=True):
            if row is None:
                raise difference_of(path, utt, missing=True)
        if kind[1] not in domains:
            raise DataDirError(
                f"{domain}: utterance '{utt}' has domain '{kind[1]}', which is not one "
                f"of {list(domains)}; correct it or the option --domains"
            )
        samples.append(parse_count(lengths, utt, length[1]))
        if not samples[-1]:
            raise DataDirError(
                f"{lengths}: '{utt}' has no samples; run the filter (stage 3)"
            )
        # Of corpora a and a-b, the latter is the last.
        corpus = max((n for p, n in corpus_of.items() if utt.startswith(p)), default=0)
        groups.append(corpus * len(domains) + domains.index(kind[1]))
        for row, starts in zip(found, places.values(), strict=True):
            starts.append(row[2])
    if not samples:
        raise DataDirError(f"{lengths}: is empty; run the stage that writes it")
    group, length = np.array(groups), np.array(samples)
    order = np.argsort((group << 32) | length, kind="stable")
    np.save(folder / "samples.npy", length[order])
    for name, starts in places.items():
        np.save(folder / f"{name}.npy", np.array(starts)[order])
    return _groups(group, length, domains, corpora, lengths)


def _groups(
    group: np.ndarray,
    samples: np.ndarray,
    domains: Sequence[str],
    corpora: Sequence[str],
    source: Path,
) -> list[Group]:
    """List the groups that have utterances, by the group and length of each."""
    names = [OTHERS, *corpora]
    counts = np.bincount(group, minlength=len(names) * len(domains))
    totals = np.zeros(len(counts), np.int64)
    np.add.at(totals, group, samples)
    groups, first = [], 0
    for number in np.flatnonzero(counts).tolist():
        name, place = divmod(number, len(domains))
        last, total = first + int(counts[number]), int(totals[number])
        groups.append(Group(names[name], domains[place], first, last, total))
        first = last
    absent = sorted(set(corpora) - {one.corpus for one in groups})
    if absent:
        message = (
            f"{source}: no utterance of corpus '{absent[0]}', whose ids would begin "
            f"with '{absent[0]}-'"
        )
        if len(absent) == len(corpora):
            raise DataDirError(f"{message}, nor of any other that has a weight")
        logging.warning(message)
    return groups
