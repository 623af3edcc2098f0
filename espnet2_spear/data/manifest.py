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
import mmap
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espnet2_spear.data.lists import ListError, ListFile, blocks, lines_of
from espnet2_spear.fileio.hashes import digest_of

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
            ListError: a file that is not there.
        """
        paths = {"lengths": self.lengths, "domain": self.domain, **self.files}
        facts = {}
        for name, path in paths.items():
            try:
                stat = os.stat(path)
            except OSError as error:
                raise ListError(
                    f"{path}: cannot be read ({error.strerror}); run the stage that "
                    "writes it, or correct the option that names it"
                ) from error
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
        ListError: a missing or damaged file of the manifest, or a list that is gone.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.groups = [Group(**group) for group in content["groups"]]
            self.files = {name: content["lists"][name] for name in content["files"]}
            self.samples = self._load("samples")
            self._offsets = {name: self._load(name) for name in self.files}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ListError(
                f"{path}: missing or damaged ({error!r}); remove the folder, and it is "
                "made again"
            ) from error
        self._lists = {name: _map(facts) for name, facts in self.files.items()}

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
            ListError: lists that disagree, because one was changed in place while it
                was in use.
        """
        utt, values = None, {}
        for name, offsets in self._offsets.items():
            begin = int(offsets[row])
            text = self._lists[name]
            end = text.find(b"\n", begin)
            line = text[begin : end if end >= 0 else len(text)].decode("utf-8")
            key, value = line.split(maxsplit=1)
            if utt not in (None, key):
                raise ListError(
                    f"{self.files[name]['path']}: changed during the training ('{key}' "
                    f"instead of '{utt}'); start again with --resume true"
                )
            utt, values[name] = key, value.rstrip()
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
        ListError: a list that is missing, malformed, or lacks utterances; a domain
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
    digest = digest_of(identity)
    target = folder / digest[:16]
    if not (target / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock"):
            if not (target / INDEX).exists():
                _build_at(target, lists, identity)
    return Manifest(target)


def _build_at(target: Path, lists: Lists, identity: Mapping[str, Any]) -> None:
    start = time.perf_counter()
    prefix = f".building-{socket.gethostname()}-"
    for stale in target.parent.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    try:
        groups = _build(part, lists, identity["domains"], identity["corpora"])
        if lists.facts() != identity["lists"]:
            raise ListError(
                f"{target}: a list was changed while it was read; start again"
            )
        content = {**identity, "groups": [asdict(group) for group in groups]}
        text = json.dumps(content, indent=1) + "\n"
        (part / INDEX).write_text(text, encoding="utf-8")
        os.chmod(part, 0o755)
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
    reference = ListFile(lists.lengths)
    reference.check_unique()
    samples = reference.integers()
    if (empty := np.flatnonzero(samples == 0)).size:
        raise ListError(
            f"{reference.path}: '{reference.key(int(empty[0]))}' has no samples; run "
            "the filter (stage 3)"
        )
    domain = _domains(reference, ListFile(lists.domain), domains)
    corpus = _corpora(reference, corpora)
    group = corpus * len(domains) + domain
    order = np.argsort((group << 32) | samples, kind="stable")
    samples = samples[order]
    np.save(folder / "samples.npy", samples)
    for name, path in lists.files.items():
        other = ListFile(path)
        lines = lines_of(reference, other)
        lines = order if lines is None else lines[order]
        np.save(folder / f"{name}.npy", other.starts[lines])
    names = [OTHERS, *corpora]
    ends = np.cumsum(np.bincount(group, minlength=len(names) * len(domains)))
    groups = []
    for number, last in enumerate(ends.tolist()):
        first = int(ends[number - 1]) if number else 0
        if first < last:
            total = int(samples[first:last].sum(dtype=np.int64))
            name, place = divmod(number, len(domains))
            groups.append(Group(names[name], domains[place], first, last, total))
    absent = sorted(set(corpora) - {one.corpus for one in groups})
    if absent:
        message = (
            f"{reference.path}: no utterance of corpus '{absent[0]}', whose ids would "
            f"begin with '{absent[0]}-'"
        )
        if len(absent) == len(corpora):
            raise ListError(f"{message}, nor of any other that has a weight")
        logging.warning(message)
    return groups


def _domains(
    reference: ListFile, table: ListFile, domains: Sequence[str]
) -> np.ndarray:
    """Index into ``domains`` of every utterance, int64 (n,)."""
    width = max(len(name.encode()) for name in domains) + 1
    result = np.full(len(table), -1, np.int64)
    for first, last in blocks(len(table)):
        values = table.values(first, last, width)
        for number, name in enumerate(domains):
            result[first:last][values == name.encode()] = number
    if (unknown := np.flatnonzero(result < 0)).size:
        number = int(unknown[0])
        raise ListError(
            f"{table.path}, line {number + 1}: '{table.line(number)}' has a domain "
            f"that is none of {list(domains)}; correct it or the option --domains"
        )
    lines = lines_of(reference, table)
    return result if lines is None else result[lines]


def _corpora(reference: ListFile, corpora: Sequence[str]) -> np.ndarray:
    """1 + index into ``corpora`` of every utterance, 0 for the others, int64 (n,)."""
    result = np.zeros(len(reference), np.int64)
    prefixes = [f"{name}-".encode() for name in corpora]
    for first, last in blocks(len(reference)):
        for number, prefix in enumerate(prefixes, 1):
            keys = reference.keys(first, last, len(prefix))
            result[first:last][keys == prefix] = number
    return result


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that a process loses when it ends, however it does."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _map(facts: Mapping[str, Any]) -> mmap.mmap:
    try:
        with open(facts["path"], "rb") as file:
            if os.fstat(file.fileno()).st_size == facts["size"]:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        problem = "has another size"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise ListError(
        f"{facts['path']}: {problem} since the training began; start again with "
        "--resume true"
    )
