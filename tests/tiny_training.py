"""A training of the tiny student on random audio, and processes that run it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from data_dirs import espnet_data

from espnet2_spear.fileio.ark import CodesWriter, write_missing_codes

RATE = 16000
CODEBOOKS = {"speech": 4, "audio": 2}  # at 50 and 25 Hz
FORK = multiprocessing.get_context("fork")


# Two by two, so that a batch of two can be mixed.
DOMAINS = ("speech", "speech", "audio", "audio")


def write_data(
    folder: Path, utts: int = 12, domains: Sequence[str] = DOMAINS
) -> dict[str, str]:
    """Write audio, domains, codes of two teachers and noise; returns name -> table.

    Utterances take turns with domains; those of speech have no codes of the audio
    teacher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = ("wav.scp", "utt2domain", "shape", "noise.scp")
    tables = {name: folder / name for name in names}
    lines: dict[str, list[str]] = {name: [] for name in tables}
    codes = {name: folder / f"{name}.scp" for name in CODEBOOKS}
    missing, absent = write_missing_codes(folder / "missing.ark", 2), []
    with (
        CodesWriter(folder / "speech.ark", codes["speech"]) as speech,
        CodesWriter(folder / "audio.ark", codes["audio"]) as audio,
    ):
        for i in range(utts):
            utt = f"u{i:04d}"
            samples = int(RATE / 2 * (1 + rng.random()))
            noise = 0.1 * rng.standard_normal(samples)
            wav = folder / f"{utt}.wav"
            soundfile.write(wav, noise.astype(np.float32), RATE)
            lines["wav.scp"].append(f"{utt} {wav}\n")
            domain = domains[i % len(domains)]
            lines["utt2domain"].append(f"{utt} {domain}\n")
            lines["shape"].append(f"{utt} {samples}\n")
            speech.write(utt, rng.integers(0, 256, (samples // 320, 4)))
            if domain == "audio":
                audio.write(utt, rng.integers(0, 256, (samples // 640, 2)))
            else:
                absent.append(f"{utt} {missing}\n")
    written = codes["audio"].read_text(encoding="utf-8").splitlines(keepends=True)
    codes["audio"].write_text("".join(sorted(written + absent)), encoding="utf-8")
    for i in range(3):
        hum = 0.1 * rng.standard_normal(RATE * (i + 1) // 2)
        soundfile.write(folder / f"noise{i}.wav", hum.astype(np.float32), RATE)
        lines["noise.scp"].append(f"n{i} {folder}/noise{i}.wav\n")
    for name, path in tables.items():
        path.write_text("".join(lines[name]), encoding="utf-8")
    return {
        "speech": str(tables["wav.scp"]),
        "domain": str(tables["utt2domain"]),
        "shape": str(tables["shape"]),
        "noise": str(tables["noise.scp"]),
        **{f"codes_{name}": str(path) for name, path in codes.items()},
    }


def options(data: dict[str, str], out: Path, *more: object) -> list[str]:
    """Command line of spear_train; later options win."""
    cmd = [
        *("--student", "tiny", "--ngpu", "0", "--num_workers", "0", "--seed", "1"),
        # Everything that changes from step to step is on.
        *("--student_conf", "regularize=true"),
        *("--mixer_conf", "preset=token_mixing", "--noise_scp", data["noise"]),
        *("--mixer_conf", "rules.speech.prob=0.9"),
        *("--mixer_conf", "rules.speech.noise_prob=0.5"),
        *("--use_tensorboard", "false", "--use_matplotlib", "false"),
        *("--batch_type", "unsorted", "--batch_size", "2", "--max_epoch", "2"),
        *("--optim", "scaledadam", "--optim_conf", "lr=0.01", "--grad_clip", "1e9"),
        *("--scheduler", "eden", "--scheduler_conf", "lr_batches=100"),
        *(
            "--scheduler_conf",
            "lr_hours=0.01",
            "--scheduler_conf",
            "hours_per_batch=null",
        ),
        *("--average_period", "2", "--log_interval", "3", "--resume", "true"),
        *("--output_dir", str(out)),
    ]
    return cmd + data_options(data) + [str(word) for word in more]


def data_options(data: dict[str, str]) -> list[str]:
    """Those that name the data and say what they are."""
    cmd = []
    for name, rate in (("speech", 50.0), ("audio", 25.0)):
        cmd += ["--teachers", f"{name}.num_codebooks={CODEBOOKS[name]}"]
        cmd += ["--teachers", f"{name}.codebook_size=256"]
        cmd += ["--teachers", f"{name}.frame_rate={rate}"]
    kinds = {"speech": "sound", "domain": "text"}
    kinds |= {"codes_speech": "kaldi_ark", "codes_audio": "kaldi_ark"}
    files = {name: (data[name], kind) for name, kind in kinds.items()}
    return cmd + espnet_data(files, data["shape"])


def with_other_audio(
    cmd: Sequence[str], data: dict[str, str], other: dict[str, Path]
) -> list[str]:
    """The command, but the training (not the validation) reads other files of some.

    Args:
        cmd: of :func:`options`.
        data: of :func:`write_data`.
        other: utterance -> file; the new table lies beside the first.
    """
    table = next(iter(other.values())).with_name("wav.scp")
    rows = (line.split() for line in Path(data["speech"]).read_text().splitlines())
    table.write_text("".join(f"{utt} {other.get(utt, wav)}\n" for utt, wav in rows))
    cmd = list(cmd)
    cmd[cmd.index(f"{data['speech']},speech,sound")] = f"{table},speech,sound"
    return cmd


def write_nan(data: dict[str, str], path: Path, utt: str) -> None:
    """Write as many samples of nan as an utterance has."""
    rows = (line.split() for line in Path(data["shape"]).read_text().splitlines())
    nan = np.full(int(dict(rows)[utt]), np.nan, dtype=np.float32)
    soundfile.write(path, nan, RATE, subtype="FLOAT")


def spear_train(cmd: list[str]) -> None:
    """Pre-train a student; imported when it is called."""
    from espnet2_spear.bin.spear_train import main

    main(cmd=cmd)


def start(
    cmd: Sequence[str],
    log: Path,
    before: Callable[[], None] = lambda: None,
    env: dict[str, str] | None = None,
    main: Callable[[list[str]], object] = spear_train,
) -> multiprocessing.Process:
    """Train in a forked process: it is real, and need not import everything again.

    Args:
        cmd: the command's words.
        log: gets standard output and error.
        before: runs first in the new process.
        env: added to the environment.
        main: the command.
    """

    def work() -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ.update(env or {})
        for handler in list(__import__("logging").getLogger().handlers):
            __import__("logging").getLogger().removeHandler(handler)
        torch.set_num_threads(1)
        before()
        main(list(cmd))

    process = FORK.Process(target=work)
    process.start()
    return process


def train(cmd: Sequence[str], log: Path, before=lambda: None, env=None) -> int:
    """Run to the end; the exit code, negative for a signal."""
    process = start(cmd, log, before, env)
    process.join()
    return process.exitcode


def train_twice(cmd: Sequence[str], folder: Path) -> list[dict[str, torch.Tensor]]:
    """One epoch, then a second one resumed from it; the weights after each.

    Args:
        cmd: of :func:`options`, whose output is ``folder``/exp.
        folder: logs are written here.
    """
    states = []
    for epoch in (1, 2):
        log = folder / f"log{epoch}"
        assert train([*cmd, "--max_epoch", str(epoch)], log) == 0, log.read_text()
        states.append(torch.load(folder / f"exp/{epoch}epoch.pth", weights_only=True))
    return states


def launch(
    cmd: Sequence[str],
    folder: Path,
    before: Callable[[int], Callable[[], None]] = lambda rank: lambda: None,
    ranks: int = 2,
    slurm: bool = False,
    main: Callable[[list[str]], object] = spear_train,
) -> list[multiprocessing.Process]:
    """Start the ranks of one training (gloo).

    Args:
        cmd: the command's words.
        folder: gets ``log0``, ``log1``...
        before: rank -> what runs first in it.
        ranks: how many.
        slurm: whether they find each other as srun's tasks do on a node each, by a
            file, else by addresses in the environment.
        main: the command; another than spear_train looks at the environment alone.
    """
    if main is spear_train:
        cmd = [*cmd, "--dist_backend", "gloo"]
        cmd += ["--multiprocessing_distributed", str(slurm).lower()]
    if slurm:
        cmd += ["--dist_launcher", "slurm"]
        cmd += ["--dist_init_method", f"file://{folder}/dist_init"]
        common = {"SLURM_NTASKS": ranks, "SLURM_STEP_NUM_NODES": ranks}
        common |= {"SLURM_STEP_NODELIST": f"node[1-{ranks}]", "SLURM_LOCALID": 0}
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"MASTER_PORT": free.getsockname()[1]}
        common |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": ranks}
    own = ("SLURM_PROCID", "SLURM_NODEID") if slurm else ("RANK", "LOCAL_RANK")
    processes = []
    for rank in range(ranks):
        env = {k: str(v) for k, v in {**common, **dict.fromkeys(own, rank)}.items()}
        log = folder / f"log{rank}"
        processes.append(start(cmd, log, before(rank), env, main))
    return processes


def end(
    processes: Sequence[multiprocessing.Process], seconds: float = 300
) -> list[int]:
    """Wait, and kill what still runs then; the exit codes before that."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [p.exitcode for p in processes]
    for process in processes:
        process.kill()
    return codes


def difference(a: Path, b: Path) -> str:
    """Where two files of tensors differ; empty if they are equal bit by bit."""
    a, b = (torch.load(p, map_location="cpu", weights_only=True) for p in (a, b))
    return differs(a, b)


def differs(a: object, b: object, where: str = "") -> str:
    """Where two nested contents differ; empty if they are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        if set(a) != set(b):
            return f"{where}: keys {sorted(map(str, set(a) ^ set(b)))}"
        return next((d for k in a if (d := differs(a[k], b[k], f"{where}/{k}"))), "")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        pairs = enumerate(zip(a, b, strict=True))
        return next(
            (d for i, (x, y) in pairs if (d := differs(x, y, f"{where}/{i}"))), ""
        )
    else:
        same = a == b or (a != a and b != b)
    return "" if same else f"{where}: {a} and {b}"
