#!/usr/bin/env python3
"""Evaluate the frozen features of a student on all tasks, beside what it must beat.

Called by run.sh. Stages: 1 data, 2 formatting, 3 features, 4 probes and table. Stages
1 and 2 are steps with marks (step.py). Features and scores are kept, and made again if
what they depend on has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import heads
import torch
from features import Features, Noise, kept_features
from heads import DRAWS, Score, run_probe
from systems import System, logmel, student, teacher
from table import draw, environment, table
from tasks import Clips, Data, Task, TaskError, divide

from espnet2_spear import load_model
from espnet2_spear.fileio.atomic import atomic, write_json
from espnet2_spear.fileio.datadir import read_table
from espnet2_spear.fileio.decode import split_ark
from espnet2_spear.fileio.explain import add_options, command
from espnet2_spear.teachers import load_teacher_config

HERE = Path(__file__).resolve().parent.parent
SYSTEMS = "logmel random student teachers"


@dataclass
class Folders:
    """Where things lie: data directories, formatted clips, results, packages."""

    data: Path
    dump: Path
    exp: Path
    downloads: Path

    def source(self, data: Data) -> Path:
        """Data directory."""
        return HERE / data.dir if data.dir else self.data / data.name

    def raw(self, data: Data) -> Path:
        """Formatted and filtered clips."""
        return self.dump / "raw" / data.name


def all_data(tasks: Sequence[Task]) -> list[Data]:
    """Every set of clips once; those that others are made of come first.

    Raises:
        TaskError: two tasks mean different clips by one name, or clips that no task
            describes.
    """
    found: dict[str, Data] = {}
    for task in tasks:
        for data in (task.data, *([task.noise.data] if task.noise else [])):
            if found.setdefault(data.name, data) != data:
                raise TaskError(
                    f"{task.path}: data '{data.name}' is described differently by "
                    "another task; give it a name of its own"
                )
    ordered: list[Data] = []

    def add(data: Data) -> None:
        for name in data.needs:
            if name not in found:
                raise TaskError(
                    f"data '{data.name}' needs '{name}': add the task that makes it"
                )
            add(found[name])
        if data not in ordered:
            ordered.append(data)

    for data in found.values():
        add(data)
    return ordered


def step(dry_run: bool, *words: str | Path) -> None:
    """Run a step of the recipe, unless it is done."""
    words = ("../ssl1/local/step.py", "--dry_run", str(dry_run).lower(), *words)
    subprocess.run([sys.executable, *map(str, words)], cwd=HERE, check=True)


def fetch(packages: Sequence[str], folders: Folders) -> None:
    """Fetch the packages of all tasks."""
    remedy = "Or leave out by --tasks what needs them: grep -l PACKAGE tasks/*.yaml"
    words = ["local/fetch_debs.sh", "../ssl1/local/debs.sha256", folders.downloads]
    environment = {**os.environ, "REMEDY": remedy}
    command = [*map(str, words), *packages]
    subprocess.run(command, cwd=HERE, env=environment, check=True)


def prepare(data: Data, folders: Folders, dry_run: bool) -> None:
    """Make the data directory."""
    source = folders.source(data)
    if data.dir:
        if not dry_run and not (source / "wav.scp").exists():
            raise TaskError(
                f"{source}: no data directory (no wav.scp); name another dir"
            )
        return
    places = {
        "root": folders.downloads / "root",
        "out": source,
        "raw": folders.dump / "raw",
        "data": folders.data,
    }
    words = shlex.split(data.command.format(**places))
    reads = [folders.dump / "raw" / name for name in data.needs]
    for name in data.needs:
        tables = (folders.data / name / table for table in ("labels", "groups"))
        reads += [table for table in tables if table.exists()]
    reads += [HERE / w for w in words if (HERE / w).is_file() and w.endswith(".txt")]
    inputs = [word for path in reads for word in ("--input", path)]
    mark = source / ".done.json"
    step(dry_run, "--mark", mark, *inputs, "--output", source / "wav.scp", "--", *words)


def see_files(data: Data, folders: Folders) -> None:
    """See that all files are there that stage 1 has written.

    Those of somebody's corpus are none; what is bad there is skipped and listed.

    Raises:
        TaskError: one is gone.
    """
    source = folders.source(data)
    for path in read_table(source / "wav.scp", "utterance file").values():
        file, _ = split_ark(path)
        if file.exists():
            continue
        if folders.downloads in file.parents:
            remedy = f"{source} and {folders.downloads / 'root'}"
        elif source in file.parents:
            remedy = str(source)
        else:
            continue
        raise TaskError(f"{file}: is gone; remove {remedy}, and run stage 1 again")


def format_clips(data: Data, folders: Folders, nj: int, dry_run: bool) -> None:
    """Make 16 kHz mono files; leave silence and clicks out."""
    source, raw = folders.source(data), folders.raw(data)
    if data.command and not dry_run:
        see_files(data, folders)
    org = raw.with_name(raw.name + "_org")
    python = ("--", sys.executable, "-m")
    step(
        *(dry_run, "--mark", org / ".done.json", "--source", source),
        *("--output", org / "wav.scp", *python, "espnet2_spear.bin.spear_format"),
        *("--in_dir", source, "--out_dir", org, "+", "--nj", str(nj)),
    )
    step(
        *(dry_run, "--mark", raw / ".done.json", "--input", org),
        *("--output", raw / "wav.scp", *python, "espnet2_spear.bin.spear_filter"),
        *("--in_dir", org, "--out_dir", raw, "--max_seconds", "inf"),
        *("--min_seconds", str(data.min_seconds)),
    )


def clips_of(task: Task, folders: Folders) -> tuple[Clips, dict[str, str]]:
    """The divided clips of a task, and the files of all its data."""
    wavs = read_table(folders.raw(task.data) / "wav.scp", "utterance file")
    clips = divide(task, folders.source(task.data), list(wavs), HERE)
    return clips, {utt: wavs[utt] for utt in clips.all}


def systems(args: argparse.Namespace) -> list[Callable[[], System]]:
    """What --systems names; each is built when its turn comes.

    Raises:
        TaskError: no such system.
        ConfigError: a teacher's file is bad.
    """
    teachers = [entry.partition("=")[::2] for entry in args.teachers.split()]
    if "teachers" in args.systems.split():
        for _, path in teachers:
            load_teacher_config(path)
    builders: dict[str, list[Callable[[], System]]] = {
        "logmel": [lambda: logmel(args.device)],
        "random": [lambda: student(args.student, args.device, random_seed=0)],
        "student": [lambda: student(args.student, args.device)],
        "teachers": [
            lambda name=name, path=path: teacher(name, path, args.device)
            for name, path in teachers
        ],
    }
    for name in args.systems.split():
        if name not in builders:
            raise TaskError(f"--systems {name}: one of {', '.join(builders)}")
    return [build for name in args.systems.split() for build in builders[name]]


def score(task: Task, clips: Clips, features: Features, seed: int, kept: Path) -> Score:
    """Score of a probe, from a file if the same probe made it of the same features."""
    digest = hashlib.sha256(repr((task.head, task.metric, clips)).encode())
    digest.update(Path(heads.__file__).read_bytes())
    for utt in clips.all:
        digest.update(features.values[features.rows[utt]].tobytes())
    identity = digest.hexdigest()
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found.pop("identity") == identity:
            return Score(**found)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # made again
    result = run_probe(task, clips, features, seed)
    with atomic(kept, "w") as file:
        file.write(json.dumps({"identity": identity, **asdict(result)}) + "\n")
    return result


def probe_all(
    task: Task,
    clips: Clips,
    features: Features,
    seeds: Sequence[int],
    kept: Path,
    nj: int,
) -> list[Score]:
    """Scores of all seeds, side by side: of ``nj`` threads each probe has one."""

    def one(seed: int) -> Score:
        torch.set_num_threads(1)
        file = kept.with_name(f"{kept.name}.{seed}.json")
        found = score(task, clips, features, seed, file)
        logging.info("%s: %s", file, found)
        return found

    try:
        with ThreadPoolExecutor(max(1, nj)) as pool:
            return [*pool.map(one, seeds)]
    finally:
        torch.set_num_threads(max(1, nj))


def evaluate(
    args: argparse.Namespace, tasks: Sequence[Task], folders: Folders, probes: bool
) -> None:
    """Stage 3 and, with ``probes``, 4."""
    divided = {task.name: clips_of(task, folders) for task in tasks}
    results: dict[str, dict[str, list[Score]]] = {}
    for build in systems(args):
        system = build()
        # What does not depend on the student's weights is shared by all students.
        home = folders.exp if system.name == "student" else folders.exp.parent
        cache = home / "features" / system.name
        for task in tasks:
            clips, wavs = divided[task.name]
            noise, suffix = None, f"{task.data.name}.{task.head}"
            if task.noise is not None:
                table_ = folders.raw(task.noise.data) / "wav.scp"
                files = read_table(table_, "utterance file")
                parts = {utt: part for part, utts in clips.utts.items() for utt in utts}
                noise = Noise(files, task.noise.snr, parts)
                suffix += f".{task.noise.data.name}{task.noise.snr:g}dB"
            found = kept_features(
                cache / suffix, system, wavs, task.head, noise, args.device
            )
            if not probes:
                continue
            kept = home / "scores" / f"{task.name}.{system.name}"
            scores = probe_all(task, clips, found, args.seeds, kept, args.nj)
            results.setdefault(system.title, {})[task.name] = scores
    if probes:
        write(tasks, divided, results, args, folders.exp)


def write(
    tasks: Sequence[Task],
    divided: dict[str, tuple[Clips, dict[str, str]]],
    results: dict[str, dict[str, list[Score]]],
    args: argparse.Namespace,
    exp: Path,
) -> None:
    """Write RESULTS.md, RESULTS.json and the picture."""
    lines = []
    for task in tasks:
        clips = divided[task.name][0]
        counts = ", ".join(f"{part} {len(utts)}" for part, utts in clips.utts.items())
        kind = "characters" if task.head == "ctc" else "classes"
        lines.append(f"- {task.name}: clips: {counts}; {len(clips.classes)} {kind}")
    text = [
        "# RESULTS",
        environment(),
        f"Student `{args.student}`. Mean over seeds {', '.join(map(str, args.seeds))} "
        "of the probe and its standard error, which comes from the test clips (drawn "
        f"anew {DRAWS} times) and the seeds. Choices are made on dev.",
        table(tasks, results),
        "\n".join(lines) + "\n",
    ]
    exp.mkdir(parents=True, exist_ok=True)  # no features of its own without a student
    (exp / "RESULTS.md").write_text("\n\n".join(text), encoding="utf-8")
    content = {
        system: {name: [asdict(s) for s in scores] for name, scores in by_task.items()}
        for system, by_task in results.items()
    }
    write_json(exp / "RESULTS.json", content)
    draw(tasks, results, exp / "RESULTS.png")
    print(table(tasks, results))


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, student="", tag="", teachers="", systems=SYSTEMS, seeds="0 1 2")
    add_options(parser, stage=1, stop_stage=4, nj=1, device="cpu")
    parser.add_argument("--tasks", default="", help="names or paths; empty: all")
    parser.add_argument("--full", choices=["true", "false"], default="false")
    parser.add_argument("--dry_run", choices=["true", "false"], default="false")
    for name in ("data", "dump", "exp"):
        parser.add_argument(f"--{name}dir", type=Path, default=Path(name))
    parser.add_argument("--downloads", type=Path, default=Path("../ssl1/downloads"))
    return parser


def chosen_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks that were asked for; by default those without a large package."""
    if args.tasks:
        names = [Path(name) for name in args.tasks.split()]
        paths = [p if p.suffix else HERE / "tasks" / f"{p}.yaml" for p in names]
        for name, count in Counter(path.stem for path in paths).items():
            if count > 1:
                raise TaskError(f"--tasks: two are called '{name}'; rename a file")
        return [Task.read(path) for path in paths]
    tasks = [Task.read(path) for path in sorted((HERE / "tasks").glob("*.yaml"))]
    chosen = [t for t in tasks if args.full == "true" or not t.data.large]
    return sorted(chosen, key=lambda t: (t.domain != "speech", t.name))


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Run the stages.

    Raises:
        TaskError: a task that cannot be evaluated.
    """
    args.seeds = [int(seed) for seed in args.seeds.split()]
    tasks = chosen_tasks(args)
    path = Path(args.student)
    # A student is called as its folder is, or by its whole id on the hub.
    name = args.student.replace("/", "_")
    if path.is_file():
        name = Path(os.path.abspath(path)).parent.name
    tag = args.tag or (path.name if path.is_dir() else name)
    folders = Folders(
        args.datadir.resolve(),
        args.dumpdir.resolve(),
        args.expdir.resolve() / tag,
        args.downloads.resolve(),
    )
    wanted = range(args.stage, args.stop_stage + 1)
    dry_run = args.dry_run == "true"
    everything = all_data(tasks)
    if not dry_run and (3 in wanted or 4 in wanted):  # is told before hours go by
        systems(args)
        if {"student", "random"} & {*args.systems.split()}:
            load_model(args.student)
    if not dry_run and 1 in wanted:
        packages = dict.fromkeys(name for data in everything for name in data.packages)
        if packages:
            fetch([*packages], folders)
    for data in everything:
        # Both stages of one before the next: some are made of others' formatted clips.
        if 1 in wanted:
            prepare(data, folders, dry_run)
        if 2 in wanted:
            format_clips(data, folders, args.nj, dry_run)
    if 2 in wanted and not dry_run:  # bad labels and splits, too
        for task in tasks:
            clips_of(task, folders)
    if dry_run:
        names = ", ".join(task.name for task in tasks)
        print(f"features and probes of {names}: {folders.exp}")
    elif 3 in wanted or 4 in wanted:
        torch.set_num_threads(max(1, args.nj))
        evaluate(args, tasks, folders, 4 in wanted)


if __name__ == "__main__":
    main()
