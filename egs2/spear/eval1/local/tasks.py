"""Tasks of the evaluation: one YAML file each, checked before anything is computed.

A file of `tasks/` says what is asked of which clips:

    title: speakers                      # heading of its column
    domain: speech                       # speech or audio: which mean rank it enters
    data:                                # where the clips come from
        name: characters                 # folder in data/ and dump/raw/
        packages: [flight-of-the-amazon-queen]
        command: python local/data_fotaq.py --root {root} --out_dir {out}
    label: labels                        # table of the data directory, or text
    split: splits/speakers.txt           # clip or group, and train, dev or test
    head: linear                         # or ctc, frames
    metric: accuracy                     # or map, cer, fer

README.md explains every key. `like: NAME` takes over what another task says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear.errors import UserError
from espnet2_spear.fileio.datadir import DataDirError, read_table

PARTS = ("train", "dev", "test")
ALIASES = {"valid": "dev", "val": "dev", "eval": "test"}  # in corpora's own tables
# Head -> its metrics.
HEADS = {"linear": ("accuracy", "map"), "ctc": ("cer",), "frames": ("fer",)}
DOMAINS = ("speech", "audio")
LOWER_IS_BETTER = ("cer", "fer")


class TaskError(UserError):
    """A task that cannot be evaluated; the message names its file and the remedy."""


@dataclass(frozen=True)
class Data:
    """Where clips come from: a command that makes a data directory, or a directory.

    Attributes:
        name: of the folders in data/ and dump/raw/.
        command: makes the directory; {root}, {out}, {data} and {raw} stand for the
            unpacked packages, the directory to be made, data and dump/raw.
        dir: a data directory that is there already, in place of a command.
        packages: Debian packages that the command reads.
        needs: names of data whose formatted clips the command reads.
        min_seconds: shorter clips are left out.
        large: whether more than 100 MB have to be fetched.
    """

    name: str
    command: str = ""
    dir: str = ""
    packages: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    min_seconds: float = 0.1
    large: bool = False


@dataclass(frozen=True)
class Noise:
    """Noise that is added to every clip.

    Attributes:
        data: clips to take noise from.
        snr: dB, of mean squares.
    """

    data: Data
    snr: float


@dataclass(frozen=True)
class Task:
    """What is asked of which clips; see the head of this file."""

    path: Path
    title: str
    domain: str
    data: Data
    label: str
    split: str | Mapping[str, str]
    head: str
    metric: str
    noise: Noise | None = None

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.stem

    @classmethod
    def read(cls, path: Path) -> Task:
        """Read a YAML file.

        Raises:
            TaskError: no such file, unknown or missing keys, or values that do not
                fit together.
        """
        conf = _load(path)
        known = {f.name for f in fields(cls)} - {"path"}
        if unknown := sorted(set(conf) - known):
            raise TaskError(
                f"{path}: unknown keys {unknown}; known are {sorted(known)}"
            )
        if missing := sorted(known - {"noise"} - set(conf)):
            raise TaskError(f"{path}: lacks {missing}")
        conf["data"] = _data(path, conf["data"])
        if conf.get("noise") is not None:
            noise = conf["noise"]
            if not isinstance(noise, dict) or set(noise) != {"data", "snr"}:
                raise TaskError(f"{path}: noise: expected data and snr (dB)")
            conf["noise"] = Noise(_data(path, noise["data"]), float(noise["snr"]))
        task = cls(path=path, **conf)
        for key, value, allowed in (
            ("domain", task.domain, DOMAINS),
            ("head", task.head, tuple(HEADS)),
            ("metric", task.metric, HEADS.get(task.head, ())),
        ):
            if value not in allowed:
                raise TaskError(f"{path}: {key} '{value}'; one of {', '.join(allowed)}")
        return task


def _load(path: Path) -> dict[str, Any]:
    try:
        conf = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise TaskError(f"{path}: no such task; there are: {known}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TaskError(f"{path}: unreadable ({error})") from None
    if not isinstance(conf, dict):
        raise TaskError(f"{path}: expected keys such as title, data, label")
    like = conf.pop("like", None)
    return conf if like is None else {**_load(path.with_name(f"{like}.yaml")), **conf}


def _data(path: Path, conf: Any) -> Data:
    try:
        data = Data(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in conf.items()}
        )
    except (TypeError, AttributeError):
        keys = ", ".join(f.name for f in fields(Data))
        raise TaskError(f"{path}: data: expected some of {keys}") from None
    if bool(data.command) == bool(data.dir):
        raise TaskError(f"{path}: data '{data.name}': give a command, or a dir")
    return data


@dataclass
class Clips:
    """The clips of a task, divided.

    Attributes:
        utts: part -> names.
        labels: utterance -> its class(es), or its text, or (frames) `class end ...`.
        classes: all classes, sorted; of text, all characters.
        groups: utterance -> its group, if there are groups.
    """

    utts: dict[str, list[str]]
    labels: dict[str, str]
    classes: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> list[str]:
        """Names of all parts."""
        return [utt for part in PARTS for utt in self.utts[part]]


def divide(task: Task, source: Path, present: Sequence[str], here: Path) -> Clips:
    """Read labels and split of the clips that are there.

    Args:
        task: the task.
        source: its data directory, with the table of labels and, if a split must not
            divide them, `groups`.
        present: clips that are left after formatting and filtering.
        here: folder that paths in the task begin at.

    Raises:
        TaskError: a clip without label or part, a group or text in two parts, a class
            without clips in some part, several classes where accuracy is asked for.
    """
    table = source / task.label
    labels = _table(task, table, "utterance label")
    groups_file = source / "groups"
    groups = (
        _table(task, groups_file, "utterance group") if groups_file.exists() else {}
    )
    if task.label == "text":  # of a corpus some prompts may have none
        present = [utt for utt in present if utt in labels]
    for utt in present:
        if utt not in labels:
            raise TaskError(f"{task.path}: {table} has no label of '{utt}'; add it")
    for utt in present if groups else ():
        if utt not in groups:
            raise TaskError(f"{task.path}: {groups_file} has no group of '{utt}'")
    part_of = _parts(task, source, present, groups, labels, here)
    _check_leaks(task, part_of, groups, labels)
    if task.head == "linear" and task.metric == "accuracy":
        for utt in present:
            if len(labels[utt].split()) != 1:
                raise TaskError(
                    f"{task.path}: {table}: '{utt}' has several classes "
                    f"({labels[utt]}), of which accuracy knows nothing: write a class "
                    "without spaces, or let the metric be map"
                )
    utts = {p: [utt for utt in present if part_of[utt] == p] for p in PARTS}
    clips = Clips(utts, {utt: labels[utt] for utt in present}, groups=groups)
    seen = {part: _symbols(task, clips, part) for part in PARTS}
    clips.classes = sorted(seen["train"])
    for part in PARTS:
        if not utts[part]:
            raise TaskError(f"{task.path}: {task.split}: no clip is in part {part}")
        if absent := sorted(set(seen[part]) - set(seen["train"])):
            raise TaskError(
                f"{task.path}: '{absent[0]}' has clips in {part}, but none in train; "
                f"correct {task.split}"
            )
    if len(clips.classes) < 2:
        raise TaskError(f"{task.path}: {table}: needs two classes at least")
    return clips


def _symbols(task: Task, clips: Clips, part: str) -> Counter[str]:
    count: Counter[str] = Counter()
    for utt in clips.utts[part]:
        label = clips.labels[utt]
        if task.head == "frames":
            count.update(name for name, _ in spans(task, utt, label))
        else:
            count.update(label if task.head == "ctc" else label.split())
    return count


def spans(task: Task, utt: str, label: str) -> list[tuple[str, float]]:
    """Classes of a clip one after another, each with its end in seconds.

    Raises:
        TaskError: no such label.
    """
    words = label.split()
    try:
        ends = [float(word) for word in words[1::2]]
        found = list(zip(words[::2], ends, strict=True))
        if ends == sorted(ends) and ends[0] >= 0:
            return found
    except ValueError:
        pass
    raise TaskError(
        f"{task.path}: {task.label} of '{utt}': expected 'class end class end ...', "
        "ends in seconds that rise"
    )


def _table(task: Task, path: Path, columns: str) -> dict[str, str]:
    try:
        return read_table(path, columns)
    except DataDirError as error:
        raise TaskError(f"{task.path}: {error}") from None


def _parts(
    task: Task,
    source: Path,
    present: Sequence[str],
    groups: Mapping[str, str],
    known: Mapping[str, str],
    here: Path,
) -> dict[str, str]:
    """Utterance -> part, by a table of clips or groups, or by lists of dev and test."""
    if isinstance(task.split, Mapping):  # lists of utterances; the others are for train
        if set(task.split) != {"dev", "test"}:
            raise TaskError(
                f"{task.path}: split: a table, or a list each of dev and test"
            )
        listed: dict[str, str] = {}
        for part, name in task.split.items():
            for utt in _words(task, here / name):
                if utt not in known:
                    raise TaskError(
                        f"{task.path}: {name}: '{utt}' is no clip of {source}; correct "
                        "its name"
                    )
                if listed.setdefault(utt, part) != part:
                    raise TaskError(
                        f"{task.path}: '{utt}' is listed for dev and for test; remove "
                        "it from one of the lists"
                    )
        return {utt: listed.get(utt, "train") for utt in present}
    path = source / "splits" if task.split == "splits" else here / task.split
    table = _table(task, path, "utterance part")
    table = {key: ALIASES.get(part, part) for key, part in table.items()}
    if wrong := sorted(set(table.values()) - set(PARTS)):
        raise TaskError(f"{path}: part '{wrong[0]}'; one of {', '.join(PARTS)}")
    parts = {}
    for utt in present:
        part = table.get(utt, table.get(groups.get(utt, "")))
        if part is None:
            raise TaskError(f"{path}: no part of '{utt}' (or of its group); add it")
        parts[utt] = part
    return parts


def _words(task: Task, path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise TaskError(f"{task.path}: {path}: {error.strerror}") from None


def _check_leaks(
    task: Task,
    part_of: Mapping[str, str],
    groups: Mapping[str, str],
    labels: Mapping[str, str],
) -> None:
    """Raise TaskError if two parts share a group, or two of a text task a text."""
    owner: dict[tuple[str, str], str] = {}
    for utt, part in part_of.items():
        keys = [("group", groups.get(utt, utt))]
        if task.label == "text":
            keys.append(("text", labels[utt]))
        for key in keys:
            if owner.setdefault(key, part) != part:
                raise TaskError(
                    f"{task.path}: {task.split}: the {key[0]} '{key[1]}' is in "
                    f"{owner[key]} and {part} (such as '{utt}'), which must not share "
                    "it"
                )
