#!/usr/bin/env python3
"""Run a command of the recipe, unless it was done before on the same inputs.

    step.py --mark M --input A --output B [--runner "run_job.sh LOG"] -- COMMAND

A mark remembers the command and the hashes of its inputs. The command is run again
when one of them differs or an output is gone, and it is said which. Words of the
command after a lone + (number of jobs, devices) do not count. With --refuse nothing is
made again because something changed: that is an error. With --dry_run true
nothing is run: the command, its inputs and outputs and what would be done are printed.
"""

import argparse
import datetime
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from espnet2_spear.fileio.atomic import write_json
from espnet2_spear.fileio.decode import split_ark
from espnet2_spear.fileio.explain import option_parser
from espnet2_spear.fileio.folders import find_audio
from espnet2_spear.fileio.hashes import hash_of

VERSION = 1


# Files of a data directory.
TABLES = ("wav.scp", "segments", "utt2spk", "utt2domain", "text", "utt2num_samples")
TABLES += ("utt2peak_db", "skipped.txt")


def digest_of(path: Path, source: bool = False) -> str:
    """Hash of what a file or a Kaldi data directory says.

    Of any other folder the names and sizes of all files are hashed. YAML is hashed as
    parsed, so that its comments do not count.

    Args:
        path: file or folder.
        source: its recordings are not of this recipe's making: another size or time of
            a recording counts. (What spear_format makes has another name then.)
    """
    digest = hashlib.sha256()
    if (path / "wav.scp").exists():
        for name in TABLES:
            if (path / name).exists():
                digest.update(f"{name} {digest_of(path / name)}\n".encode())
        if source:
            with open(path / "wav.scp", "rb") as table:
                for line in table:
                    *_, value = os.fsdecode(line).strip().split(maxsplit=1) or [""]
                    file, _ = split_ark(find_audio(value, path))
                    digest.update(f"{stamp_of(file)}\n".encode())
    elif path.is_dir():
        walked = set()
        for folder, folders, names in os.walk(path, followlinks=True):
            folders.sort()
            if (real := os.path.realpath(folder)) in walked:  # a link back
                folders.clear()
                continue
            walked.add(real)
            for name in sorted(names):
                file = os.path.join(folder, name)
                size, time = stamp_of(file)
                line = f"{os.path.relpath(file, path)} {size}"
                line += f" {time}\n" if source else "\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
    elif path.suffix == ".yaml":
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    else:
        return hash_of(path)
    return digest.hexdigest()


def stamp_of(file: str | Path) -> tuple[int | None, int | None]:
    """Size and time of a file; None if there is none."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError):
        return None, None
    return stat.st_size, stat.st_mtime_ns


def facts_of(path: Path, source: bool, before: dict[str, Any]) -> dict[str, Any]:
    """Hash, size and time of an input; a file as it was before is not read again."""
    if not path.exists():
        return {"sha256": None}
    stat = path.stat()
    facts = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if path.is_file() and all(before.get(k) == v for k, v in facts.items()):
        return before
    return {"sha256": digest_of(path, source), **facts}


@dataclass
class Step:
    """A command with its inputs, outputs and mark.

    Attributes:
        mark: JSON file; absent if the command never ended well.
        command: words that count.
        inputs: files or folders it reads.
        sources: others, with recordings that are not of this recipe's making.
        outputs: files it has written when it is done.
        adopt: outputs without a mark were made by the user, and are kept.
        before: what the mark says; empty if there is none.
        facts: of the inputs, as they are now.
    """

    mark: Path
    command: list[str]
    inputs: list[Path]
    sources: list[Path]
    outputs: list[Path]
    adopt: bool = False

    def __post_init__(self) -> None:
        self.before: dict[str, Any] = {}
        if self.mark.exists():
            try:
                self.before = json.loads(self.mark.read_text(encoding="utf-8"))
            except ValueError:
                self.before = {"version": "a damaged mark"}
        known = self.before.get("inputs", {})
        self.facts = {
            str(p): facts_of(p, p in self.sources, known.get(str(p), {}))
            for p in (*self.inputs, *self.sources)
        }

    def state(self) -> tuple[bool, str]:
        """Whether it has to be run, and why (not)."""
        missing = [str(path) for path in self.outputs if not path.exists()]
        if not self.before:
            if self.adopt and not missing:
                return False, "nothing tells how it was made; it is used as it is"
            return True, "not done yet"
        if self.before.get("pending"):
            return True, "an earlier run of it did not finish"
        if self.before.get("version") != VERSION:
            return True, f"{self.mark} is of another version, or damaged"
        if missing:
            return True, f"{', '.join(missing)}: gone since"
        if changes := self.changes():
            return True, "; ".join(changes)
        return False, f"done before ({self.before['finished']})"

    def changes(self) -> list[str]:
        """What differs from the last time, whether that was finished or not."""
        if "inputs" not in self.before:  # no mark, or a damaged one
            return []
        changes = option_changes(self.before["command"], self.command)
        known = self.before["inputs"]
        changes += [f"{p} is no longer read" for p in known if p not in self.facts]
        for path, facts in self.facts.items():
            if path not in known:
                changes.append(f"{path} is read as well")
            elif known[path]["sha256"] != facts["sha256"]:
                changes.append(f"{path} changed")
        return changes

    def write_mark(self, pending: bool = False) -> None:
        """Remember that it was done; the mark appears complete or not at all.

        Args:
            pending: it is about to be run. What an interrupted run leaves (or what is
                there from before) is not taken for its outputs.
        """
        content = {
            "version": VERSION,
            "command": self.command,
            "inputs": self.facts,
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
        }
        if pending:
            content["pending"] = True
        write_json(self.mark, content)


def option_changes(before: list[str], now: list[str]) -> list[str]:
    """Say in words how two commands differ."""

    def options(words: list[str]) -> dict[str, str]:
        found: dict[str, list[str]] = {}
        name = "command"
        for word in words:
            if word.startswith("--"):
                name, _, word = word.partition("=")
                found.setdefault(name, [])
                if not word:
                    continue
            found.setdefault(name, []).append(word)
        return {key: shlex.join(values) for key, values in found.items()}

    if before == now:
        return []
    left, right = options(before), options(now)
    changes = [
        f"{key} was {left.get(key) or 'not given'}, is {right.get(key) or 'not given'}"
        for key in {**left, **right}
        if left.get(key) != right.get(key)
    ]
    return changes or ["its options are in another order"]


def own_folders(values: list[str]) -> list[Path]:
    """Folders in values of run.sh --speech_dirs and --audio_dirs."""
    if not any(values):
        return []
    from data_folders import parse_folders

    return [folder for value in values for _, folder in parse_folders(value)]


def refuse(message: str) -> int:
    """Say what is wrong; returns the exit status."""
    print(f"ERROR (step.py): {message}", file=sys.stderr)
    return 1


def divide(words: list[str], mark: str) -> tuple[list[str], list[str]]:
    """Words before a mark, and behind it."""
    at = words.index(mark) if mark in words else len(words)
    return words[:at], words[at + 1 :]


def run(command: list[str]) -> int:
    """Run a command; a termination signal is passed on to it."""
    process: subprocess.Popen | None = None
    stopped = False

    def stop(number: int, _: object) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:
            process.send_signal(number)

    # Before the command starts: a signal would end this process alone in between.
    previous = signal.signal(signal.SIGTERM, stop)
    process = subprocess.Popen(command)
    if stopped:
        process.terminate()
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()  # the terminal's Ctrl-C reached it as well
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 128 - status if status < 0 else status


def show(step: Step, runs: list[tuple[list[str], list[str]]], verdict: str) -> None:
    """Print a step that is not run; runs are words before a command, and its own."""
    for runner, words in runs:
        print(f"  $ {shlex.join(words)}")
        if runner:
            print(f"      by      {shlex.join(runner)}")
    for path in (*step.inputs, *step.sources):
        print(f"      reads   {path}{'' if path.exists() else ' (not there yet)'}")
    for path in step.outputs:
        print(f"      writes  {path}")
    print(f"      would {verdict}")


def get_parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    parser = option_parser(__doc__)
    parser.add_argument("--mark", type=Path, required=True, help="file of the mark")
    parser.add_argument("--input", type=Path, default=[], action="append")
    parser.add_argument("--output", type=Path, default=[], action="append")
    parser.add_argument(
        "--source",
        type=Path,
        default=[],
        action="append",
        help="an input with recordings that are not of this recipe's making",
    )
    parser.add_argument(
        "--source_dirs", default=[], action="append", help="as run.sh --speech_dirs"
    )
    parser.add_argument("--again", default="made again", help="said of a repetition")
    parser.add_argument(
        "--refuse", metavar="REMEDY", help="an error if something changed since"
    )
    parser.add_argument("--adopt", action="store_true", help="keep unmarked outputs")
    parser.add_argument("--runner", default="", help="words before the command")
    parser.add_argument(
        "--array_runner",
        default="",
        help="words before it as an array of jobs, which is run first, with "
        "--part JOB/N added; the command itself then puts their results together",
    )
    parser.add_argument("--jobs", type=int, default=1, help="N of --array_runner")
    parser.add_argument("--dry_run", choices=["true", "false"], default="false")
    parser.usage = "%(prog)s [options] -- command [+ words that do not count]"
    return parser


def main(cmd: list[str] | None = None) -> int:
    """Return the command's exit status, 0 if it was skipped."""
    words = sys.argv[1:] if cmd is None else cmd
    own, command = divide(words, "--")
    args = get_parser().parse_args(own)
    if not command:
        get_parser().error("no command after --")
    command, uncounted = divide(command, "+")
    sources = [*args.source, *own_folders(args.source_dirs)]
    step = Step(args.mark, command, args.input, sources, args.output, args.adopt)
    todo, why = step.state()
    what = ", ".join(map(str, args.output)) or str(args.mark)
    verdict = f"{'run' if todo else 'be skipped'}: {why}"
    if args.refuse is not None and (changes := step.changes()):
        told = f"{what}: was made otherwise ({'; '.join(changes)}); {args.refuse}"
        if args.dry_run == "false":
            return refuse(told)
        verdict = f"be an error: {told}"
    words = [*command, *uncounted]
    runs = [(shlex.split(args.runner), words)]
    if args.jobs > 1:
        part = ["--part", f"JOB/{args.jobs}"]
        runs.insert(0, (shlex.split(args.array_runner), [*words, *part]))
    if args.dry_run == "true":
        show(step, runs, verdict)
        return 0
    if not todo:
        same = ", with the same inputs and options: skipped" if step.before else ""
        print(f"{what}: {why}{same}\n", end="", flush=True)
        return 0
    if step.before:
        print(f"{what}: {args.again}, because {why}\n", end="", flush=True)
    needed = (*args.input, *args.source)
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        return refuse(
            f"{', '.join(missing)}: not there; run the stage that writes it first (see "
            "--help)"
        )
    step.write_mark(pending=True)
    status = 0
    for runner, words in runs:
        status = status or run([*runner, *words])
    if status == 0:
        gone = [str(path) for path in step.outputs if not path.exists()]
        if gone:
            return refuse(
                f"the command ended well, but did not write {', '.join(gone)}: "
                f"{shlex.join(command)}"
            )
        step.write_mark()
    return status


if __name__ == "__main__":
    sys.exit(main())
