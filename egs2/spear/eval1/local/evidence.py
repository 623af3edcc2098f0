#!/usr/bin/env python3
"""Train students that differ in one idea, and compare their frozen features.

Called by evidence.sh. A student is a YAML file of evidence/ (options of ../ssl1/run.sh)
and a seed; evidence/tables.yaml says which students answer a question. A seed is a
repetition of everything behind the data: quantizers, initial weights, order of batches.
Students of a seed share its codes where they can, so differences are taken seed by
seed. What is finished is kept: each part is a stage of ssl1 or of eval1. What was
trained and scored on another machine is taken over by --known.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from differences import differences, draw, markdown
from heads import Score
from lanes import Job, Lanes, visible_gpus
from score_table import ScoreTable
from table import commit, environment, read_scores, table
from tasks import Task, TaskError

from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.datadir import read_table, write_table
from espnet2_spear.fileio.explain import add_options, command

HERE = Path(__file__).resolve().parent.parent
ARMS, SSL1 = HERE / "evidence", HERE.parent / "ssl1"
# Options of ssl1 for all: quantizers as the demo trains them; codes that tables share.
SHARED = {
    "tokenize_domains": "all",
    "quantizer_iters": "600",
    "quantizer_args": "--batch_frames 128 --lr 0.01",
    "quantizer_frames": "150000",
}
# Options of ssl1 that are this script's own, and those whose words add up.
OWN = ("stage", "stop_stage", "tag", "quantizer_tag", "nj", "dry_run")
OWN += ("datadir", "dumpdir", "expdir")
JOINED = ("config_override", "train_args")
EPOCHS, WARM_UP = 2, 300  # of the students; steps
MODEL, RESULTS, ORIGIN = "valid.loss.best.pth", "RESULTS.json", "evidence.json"
# Of characters; another number where the same features got other scores. Probe 1 set
# whole texts against the first 10 s of a clip: about 3 points more. Probe 2 learnt from
# training clips of more than 20 s, too.
PROBE = "3"


@dataclass(frozen=True)
class Arm:
    """A way to pre-train a student.

    Attributes:
        name: of its file.
        title: in tables.
        options: of ../ssl1/run.sh, beside those of all.
    """

    name: str
    title: str
    options: Mapping[str, str]

    @classmethod
    def read(cls, name: str) -> Arm:
        """Read a file of evidence/.

        Raises:
            TaskError: no such file, or other keys than title and options.
        """
        path = ARMS / f"{name}.yaml"
        if not path.exists():
            known = sorted(p.stem for p in ARMS.glob("*.yaml") if p.stem != "tables")
            raise TaskError(f"{path}: no such file; there are: {', '.join(known)}")
        conf = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(conf, dict) or not {"title"} <= set(conf) <= {
            "title",
            "options",
        }:
            raise TaskError(f"{path}: expected title, and options of ssl1/run.sh")
        options = {k: str(v or "") for k, v in (conf.get("options") or {}).items()}
        return cls(name, conf["title"], options)

    @property
    def codes(self) -> tuple[str, ...]:
        """Options that its codes depend on; equal for arms with the same codes."""
        changes = shlex.split(self.options.get("config_override", ""))
        others = {k: v for k, v in self.options.items() if k != "config_override"}
        tables = [word for word in changes if word.startswith("teachers.")]
        return (*tables, *(f"{k}={v}" for k, v in others.items()))


@dataclass(frozen=True)
class Question:
    """Arms that are compared with the first of them, by these tasks."""

    title: str
    arms: Sequence[Arm]
    tasks: Sequence[str]


def questions(only: Sequence[str], quick: bool, tasks: Sequence[str]) -> list[Question]:
    """Read tables.yaml; of each question the arms that are wanted and its first.

    Args:
        only: arms that are wanted.
        quick: those that tell most, unless ``only`` names some.
        tasks: of the questions that have none of their own.

    Raises:
        TaskError: ``only`` names what is in no table.
    """
    path = ARMS / "tables.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    wanted = list(only) or (content["quick"] if quick else [])
    every = {name for entry in content["tables"] for name in entry["arms"]}
    if unknown := sorted(set(wanted) - every):
        raise TaskError(
            f"--only {' '.join(unknown)}: in no table of {path}, which has "
            f"{', '.join(sorted(every))}"
        )
    found = []
    for entry in content["tables"]:
        first, *others = entry["arms"]
        others = [name for name in others if not wanted or name in wanted]
        if others or first in only:
            arms = [Arm.read(name) for name in (first, *others)]
            own = entry.get("tasks", tasks)
            found.append(Question(entry["title"], arms, tuple(own)))
    return found


# ------------------------------------------------------------
# Commands


def read_ssl_args(text: str, arms: Sequence[Arm]) -> dict[str, str]:
    """Options of ssl1 for all students.

    Raises:
        TaskError: malformed, an option of this script's own, or one that a student has
            otherwise.
    """
    words, options = shlex.split(text), {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or not (equals or words):
            raise TaskError(
                f"--ssl_args: {word!r}: expected --NAME VALUE of ssl1/run.sh"
            )
        name = name.removeprefix("--").replace("-", "_")
        options[name] = value if equals else words.pop(0)
    if own := [key for key in OWN if key in options]:
        raise TaskError(f"--ssl_args: --{own[0]} is set by evidence.sh")
    for arm in arms:
        for key in options.keys() & arm.options.keys() - {*JOINED}:
            if options[key] != arm.options[key]:
                raise TaskError(
                    f"--ssl_args: --{key} is what '{arm.name}' has, too; leave it out "
                    "by --only, or let evidence/ have a file for it"
                )
    return options


def ssl1(
    args: argparse.Namespace,
    arm: Arm,
    seed: int,
    stages: tuple[int, int],
    more: Mapping[str, str],
) -> list[str]:
    """A call of ssl1/run.sh."""
    first, last = map(str, stages)
    given = args.ssl_options
    options = {**SHARED, **given, **arm.options, **more}
    for key in JOINED:
        words = [table[key] for table in (given, arm.options, more) if table.get(key)]
        options |= {key: " ".join(words)} if words else {}
    options |= {"stage": first, "stop_stage": last}
    if seed:  # the quantizers of seed 0 are those of the demo
        quantizer_args = f"{options['quantizer_args']} --seed {seed}".strip()
        options |= {"quantizer_tag": f"s{seed}", "quantizer_args": quantizer_args}
    words = [str(w) for key, value in options.items() for w in (f"--{key}", value)]
    return ["./run.sh", *words]


def eval1(tasks: Sequence[str], **options: str | Path | int) -> list[str]:
    """A call of eval1/run.sh."""
    options = {"tasks": " ".join(tasks), **options}
    words = [str(w) for key, value in options.items() for w in (f"--{key}", value)]
    return [str(HERE / "run.sh"), *words]


def student_of(args: argparse.Namespace, arm: Arm, seed: int) -> Path:
    """Folder of a student."""
    return SSL1 / "exp" / f"{args.tag}_{arm.name}_s{seed}"


def student_job(
    args: argparse.Namespace, arm: Arm, seed: int, tasks: Sequence[str]
) -> Job:
    """Pre-train a student and score its features."""
    exp = student_of(args, arm, seed)
    train_args = ["--seed", str(seed)]
    if args.steps:
        train_args += [f"--max_epoch {EPOCHS}"]
        train_args += [f"--num_iters_per_epoch {args.steps // EPOCHS}"]
        marks = f"[0,{min(WARM_UP, args.steps // 2)},{args.steps}]"
        train_args += [f"--scheduler_conf warmup_steps_list={marks}"]
    more = {"tag": exp.name, "nj": "1", "train_args": " ".join(train_args)}
    score = eval1(
        tasks,
        student=exp / MODEL,
        stage=3,
        systems="student",
        seeds=args.probe_seeds,
        nj=1,
        device="cuda" if args.gpus else "cpu",
    )
    commands = [ssl1(args, arm, seed, (7, 7), more), score]
    return Job(f"{arm.name}, seed {seed}", commands, exp / "evidence.log", SSL1)


def call(command: Sequence[str]) -> None:
    """Run a recipe.

    Raises:
        TaskError: it failed; what it printed says why.
    """
    if status := subprocess.run(command, cwd=SSL1).returncode:
        raise TaskError(f"exit code {status} (see above): {shlex.join(command)}")


def prepare(
    args: argparse.Namespace,
    students: Sequence[tuple[Arm, int]],
    tasks: Sequence[str],
) -> None:
    """Make the data of both recipes, and the codes of all students."""
    every = Arm("all", "", {})
    tag = {"tag": f"{args.tag}_codes"}  # of no training
    call(ssl1(args, every, 0, (1, 3), tag))
    write_noise(SSL1 / "dump/raw/train", SSL1 / "data/evidence_noise")
    call(eval1(tasks, stop_stage=2))
    codes = {(arm.codes, seed): (arm, seed) for arm, seed in students}
    for arm, seed in codes.values():
        logging.info("codes of %s, seed %d", arm.name, seed)
        call(ssl1(args, arm, seed, (4, 6), tag))


def see_options(job: Job) -> None:
    """See that the options of a training fit, before there are data and codes.

    Raises:
        TaskError: they do not.
    """
    logging.info("do the options of %s fit?", job.name)
    command = [*job.commands[0], "--dry_run", "true"]
    told = subprocess.run(command, cwd=SSL1, capture_output=True, text=True)
    if told.returncode:
        sys.stderr.write(told.stdout + told.stderr)
        raise TaskError(f"{job.name}: its options do not fit (see above)")


def note_origin(student: Path, job: Job) -> None:
    """Write how a student is about to be trained, and by which code.

    Raises:
        TaskError: it was begun in another way.
    """
    command, file = shlex.join(job.commands[0]), student / ORIGIN
    if not (student / "train.json").exists():
        student.mkdir(parents=True, exist_ok=True)
        write_json(file, {"commit": commit(), "command": command})
    elif (begun := origin_of(student)["command"]) != command:
        raise TaskError(
            f"{student}: was begun by {begun}, not by {command}; give another --tag, "
            "or remove it"
        )


def origin_of(student: Path) -> dict[str, str]:
    """What :func:`note_origin` wrote.

    Raises:
        TaskError: no such file.
    """
    try:
        return json.loads((student / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(
            f"{student}: was not trained by evidence.sh ({error}); give another --tag, "
            "or remove it"
        ) from error


def quantizers_of(student: Path) -> str:
    """Codes that a student learnt, and the identity of their quantizer: NAME=ID ..."""
    conf = yaml.safe_load((student / "config.yaml").read_text(encoding="utf-8"))
    files = conf["train_data_path_and_name_and_type"]
    codes = {data: Path(file).stem for file, data, _ in files}
    return " ".join(
        f"{codes[f'codes_{name}']}={teacher['quantizer']}"
        for name, teacher in conf["teachers"].items()
    )


def write_noise(raw: Path, noise: Path) -> None:
    """List the general audio of the training set as noise, for students that mix."""
    domains = read_table(raw / "utt2domain", "utterance domain")
    wavs = read_table(raw / "wav.scp", "utterance file")
    noise.mkdir(parents=True, exist_ok=True)
    chosen = {utt: file for utt, file in wavs.items() if domains[utt] == "audio"}
    write_table(noise / "wav.scp", chosen)


# ------------------------------------------------------------
# Tables


def union(lists: Iterable[Sequence[str]]) -> list[str]:
    """What is in any of them, each once, in the order of its first."""
    return list(dict.fromkeys(name for names in lists for name in names))


def characters(tasks: Mapping[str, Task]) -> list[str]:
    """Tasks whose scores depend on :data:`PROBE`."""
    return [name for name, task in tasks.items() if task.head == "ctc"]


def controls_of(
    scores: ScoreTable, tasks: Sequence[str]
) -> dict[str, dict[str, list[Score]]]:
    """Name -> task -> scores of what is not trained here: log-mel, teachers."""
    arms = {path.stem for path in ARMS.glob("*.yaml")}
    return scores.others(arms, tasks)


def mean_score(scores: Sequence[Score], seed: int) -> Score:
    """Mean over the seeds of the probe, as one score of the student's seed."""
    dev, test = (
        statistics.fmean(getattr(s, part) for s in scores) for part in ("dev", "test")
    )
    return Score(seed, dev, test, [])


def add_student(student: Path, arm: Arm, seed: int, scores: ScoreTable) -> None:
    """Take over the scores of a student that was trained here."""
    found = read_scores(HERE / "exp" / student.name / RESULTS)["student"]
    means = {name: mean_score(some, seed) for name, some in found.items()}
    trained_by = origin_of(student)["commit"]
    scores.add(arm.name, means, trained_by, quantizers_of(student))


def add_controls(
    args: argparse.Namespace,
    tasks: Mapping[str, Task],
    student: Path,
    scores: ScoreTable,
) -> None:
    """Score log-mel, random weights and the teachers by tasks without such scores."""
    present = scores.present(characters(tasks))
    missing = [name for name in tasks if not controls_of(present, [name])]
    if not missing:
        return
    tag = f"{args.tag}_controls"
    options = {
        "tag": tag,
        "systems": "logmel random teachers",
        "seeds": args.probe_seeds,
        "nj": len(os.sched_getaffinity(0)),
        "device": "cuda" if args.gpus else "cpu",
    }
    if "teachers" in args.ssl_options:
        options["teachers"] = teachers_of(args.ssl_options["teachers"])
    call(eval1([*tasks], student=student / MODEL, stage=3, **options))
    for name, found in read_scores(HERE / "exp" / tag / RESULTS).items():
        means = {task: mean_score(found[task], 0) for task in missing}
        scores.add(name, means, commit())


def teachers_of(value: str) -> str:
    """--teachers of eval1 for those of ssl1: by the names of their files."""
    files = [word.partition("=")[2] for word in shlex.split(value)]
    known = [SSL1 / "conf/teachers" / f"{file}.yaml" for file in files]
    pairs = zip(files, known, strict=True)
    paths = [path if path.exists() else SSL1 / file for file, path in pairs]
    return " ".join(f"{path.stem}={path}" for path in paths)


def results_of(
    scores: ScoreTable, arm: Arm, names: Sequence[str]
) -> dict[str, list[Score]]:
    """Task -> a score for every seed that was trained, here or elsewhere."""
    seeds = scores.seeds(arm.name, names)
    students = [scores.get(arm.name, seed, names) or {} for seed in seeds]
    return {name: [s[name] for s in students] for name in names}


def report(
    args: argparse.Namespace,
    tasks: Mapping[str, Task],
    asked: Sequence[Question],
    scores: ScoreTable,
) -> None:
    """Write RESULTS.md, its pictures and scores.tsv."""
    out = HERE / "exp" / args.tag
    out.mkdir(parents=True, exist_ok=True)
    scores.write(out / "scores.tsv")
    steps = f"{args.steps} steps" if args.steps else "the configuration's steps"
    text = [
        "# RESULTS",
        environment(),
        f"Students of {steps}; seeds of the probe: {args.probe_seeds}. Mean and "
        "standard deviation over seeds of quantizers and pre-training. Differences are "
        "means over the seeds that both students have, with their standard error; "
        "'equal' is what so many pairs cannot tell apart (95 %, Student's t, one "
        "comparison at a time).",
    ]
    if earlier := scores.seeds_of_other_probes():
        text.append(
            f"Characters of seeds {', '.join(map(str, earlier))} were scored by "
            "earlier probes. Differences, which are within seeds, join all; the "
            "scores of controls and first rows are those of the present probe."
        )
    present = scores.present(characters(tasks))
    text.append("## Controls")
    for names in dict.fromkeys(question.tasks for question in asked):
        if controls := controls_of(present, names):
            text.append(table([tasks[name] for name in names], controls, ranks=False))
    for number, question in enumerate(asked, 1):
        results: dict[str, Mapping[str, Sequence[Score]]] = {
            arm.title: results_of(scores, arm, question.tasks) for arm in question.arms
        }
        first = question.arms[0]
        levels = {
            name: results_of(present, first, [name])[name] for name in question.tasks
        }
        results = {name: rows for name, rows in results.items() if any(rows.values())}
        if len(results) < min(2, len(question.arms)):
            continue  # nothing to compare yet
        if first.title not in results:
            continue  # nor anything to compare with
        shown = [tasks[name] for name in question.tasks]
        text += [f"## {question.title}", markdown(shown, results, levels)]
        draw(shown, differences(shown, results), out / f"table{number}.png")
    (out / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text[2:]))


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser; evidence.sh --help explains the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, only="", seeds="0 1 2", probe_seeds="0", steps=800, jobs=1)
    add_options(parser, tag="evidence", ssl_args="", known="")
    parser.add_argument("--quick", choices=["true", "false"], default="false")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--dry_run", choices=["true", "false"], default="false")
    return parser


@command(get_parser)
def main(args: argparse.Namespace) -> None:
    """Train, score and compare all students.

    Raises:
        TaskError: an arm or a task that there is not.
    """
    args.seeds = [int(seed) for seed in args.seeds.split()]
    common = args.tasks.split()
    asked = questions(args.only.split(), args.quick == "true", common)
    arms = list({arm.name: arm for q in asked for arm in q.arms}.values())
    tasks_of = {
        arm.name: union([common, *(q.tasks for q in asked if arm in q.arms)])
        for arm in arms
    }
    every = union(tasks_of.values())
    tasks = {name: Task.read(HERE / "tasks" / f"{name}.yaml") for name in every}
    args.ssl_options = read_ssl_args(args.ssl_args, arms)
    conditions = {"steps": str(args.steps), "ssl_args": args.ssl_args.strip()}
    conditions["probe_seeds"] = args.probe_seeds
    args.gpus = visible_gpus()
    scores = ScoreTable(args.known, conditions, PROBE)
    # Seed by seed, so that all questions have an answer early.
    students = [
        (arm, seed)
        for seed in args.seeds
        for arm in arms
        if scores.get(arm.name, seed, tasks_of[arm.name]) is None
    ]
    jobs = [student_job(args, arm, seed, tasks_of[arm.name]) for arm, seed in students]
    if args.dry_run == "true":
        for job in jobs:
            print(f"{job.name}:", *map(shlex.join, job.commands), sep="\n  ")
        return
    if students:
        new, codes = {seed for _, seed in students}, SSL1 / "dump/codes/train"
        scores.compare(new, codes)  # with codes that are there already
        pairs = [*zip(students, jobs, strict=True)]
        for job in {arm.name: job for (arm, _), job in pairs}.values():
            see_options(job)
        for (arm, seed), job in pairs:
            note_origin(student_of(args, arm, seed), job)
        prepare(args, students, every)
        scores.compare(new, codes)
    lanes = Lanes(args.jobs, args.gpus)
    failed = ""
    try:
        failed = lanes.run(jobs)
        if lanes.finished:
            any_student = students[jobs.index(lanes.finished[0])]
            add_controls(args, tasks, student_of(args, *any_student), scores)
    finally:  # what is finished has a table, whatever became of the rest
        for (arm, seed), job in zip(students, jobs, strict=True):
            if job in lanes.finished:
                add_student(student_of(args, arm, seed), arm, seed, scores)
        scores.fill(HERE / "exp" / args.tag / "scores.tsv")
        report(args, tasks, asked, scores)
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    main()
