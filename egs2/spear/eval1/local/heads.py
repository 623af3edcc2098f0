"""Probes of frozen features: a weighted sum of the layers, and one linear map.

Features are standardised by mean and deviation of the training clips, for each channel
of each layer. Then softmax weights sum the layers, and a linear map gives the scores of
classes (`linear`), of characters in every frame (`ctc`), or of a class in every frame
(`frames`). Regularisation and epoch are chosen on the part dev.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from features import Features
from sklearn.metrics import average_precision_score
from tasks import PARTS, Clips, Task, TaskError, spans
from torch import Tensor, nn
from torchaudio.functional import edit_distance

HELD_OUT = ("dev", "test")
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the weights, head linear
STEPS = 300  # of L-BFGS; fewer leave what the initial weights were in the scores
# Heads ctc and frames; batch, rate and epochs by the CER on dev of one student
# (evidence's asymmetric, seed 0): a rate of 0.004 learned too little, 0.05 and 0.1 no
# more.
EPOCHS, EVERY, BATCH, LEARNING_RATE = 60, 3, 8, 2e-2
LONGEST = 20.0  # s, of training clips of the head ctc, whose time grows with the square
FRAMES = 50  # a second, at which the head frames asks
DRAWS = 200  # of test clips, for the error of a score
SEEDING = threading.Lock()  # torch has one global generator for all threads
FEWEST = 10  # groups of test clips, which tell the error of a score


@dataclass
class Score:
    """What a probe reached, in percent.

    Attributes:
        seed: of the probe.
        dev: on the clips that choices were made on.
        test: on the test clips.
        layers: weight of each layer.
        error: standard error of ``test``: other clips would give another score; 0 if
            there are too few to tell.
    """

    seed: int
    dev: float
    test: float
    layers: list[float]
    error: float = 0.0


def bootstrap(measured: Callable[[np.ndarray], float], clips: Clips) -> float:
    """Standard error of a measure by drawing test clips anew (Efron, 1979).

    Clips of one group (a speaker, an instrument) are drawn together, as they are alike.

    Args:
        measured: numbers of clips, some several times -> measure.
        clips: of the task.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, utt in enumerate(clips.utts["test"]):
        rows_of[clips.groups.get(utt, utt)].append(row)
    if len(rows_of) < FEWEST:
        return 0.0
    rows, generator = [*rows_of.values()], np.random.default_rng(0)
    draws = (generator.integers(len(rows), size=len(rows)) for _ in range(DRAWS))
    values = [measured(np.concatenate([rows[i] for i in draw])) for draw in draws]
    return float(np.std(values, ddof=1))


class Probe(nn.Module):
    """Weighted sum of standardised layers, and a linear map.

    Args:
        mean, std: (layers, channels) of the training clips.
        classes: number of outputs.
        seed: of the initial weights.
    """

    def __init__(self, mean: Tensor, std: Tensor, classes: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.layer = nn.Parameter(torch.zeros(len(mean)))
        with SEEDING, torch.random.fork_rng():
            torch.manual_seed(seed)
            self.linear = nn.Linear(mean.size(1), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (..., classes) of features (..., layers, channels)."""
        x = (x.float() - self.mean) / self.std
        return self.linear(torch.einsum("...lc,l->...c", x, self.layer.softmax(0)))


def run_probe(task: Task, clips: Clips, features: Features, seed: int) -> Score:
    """Train, choose and test a probe."""
    head = {"linear": _linear, "ctc": _ctc, "frames": _frames}[task.head]
    return head(task, clips, features, seed)


def _statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.float()
    return values.mean(0), values.std(0, correction=0).clamp(min=1e-5)


# ------------------------------------------------------------
# One set of labels a clip.


def _linear(task: Task, clips: Clips, features: Features, seed: int) -> Score:
    x, y = {}, {}
    for part in PARTS:
        rows = [features.rows[utt].start for utt in clips.utts[part]]
        x[part] = torch.from_numpy(np.asarray(features.values[rows]))
        y[part] = targets(clips, part)
    several = bool((y["train"].sum(1) != 1).any())

    def log_probabilities(scores: Tensor) -> Tensor:
        # Precision compares clips, and cross-entropy leaves every clip a constant of
        # its own in the scores: only what is normalised can be compared.
        return F.logsigmoid(scores) if several else scores.log_softmax(-1)

    def loss_of(scores: Tensor) -> Tensor:
        if several:
            return F.binary_cross_entropy_with_logits(scores, y["train"])
        return F.cross_entropy(scores, y["train"])

    best: Score | None = None
    for decay in DECAYS:
        probe = Probe(*_statistics(x["train"]), len(clips.classes), seed)
        optimizer = torch.optim.LBFGS(
            probe.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = loss_of(probe(x["train"]))  # noqa: B023
            loss = loss + decay * probe.linear.weight.square().sum() / 2  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            scores = {part: log_probabilities(probe(x[part])) for part in HELD_OUT}
        dev, test = (measure(task.metric, scores[part], y[part]) for part in HELD_OUT)
        if best is None or dev > best.dev:
            best = Score(seed, dev, test, probe.layer.softmax(0).tolist())
            heard = scores["test"]
    assert best is not None
    best.error = bootstrap(
        lambda rows: measure(task.metric, heard[rows], y["test"][rows]), clips
    )
    return best


def targets(clips: Clips, part: str) -> Tensor:
    """(clips, classes) of 0 and 1."""
    index = {name: i for i, name in enumerate(clips.classes)}
    y = torch.zeros(len(clips.utts[part]), len(index))
    for row, utt in enumerate(clips.utts[part]):
        for name in clips.labels[utt].split():
            y[row, index[name]] = 1.0
    return y


def measure(metric: str, scores: Tensor, y: Tensor) -> float:
    """Accuracy, or mean average precision over the classes that occur, in percent."""
    if metric == "accuracy":
        return 100 * (scores.argmax(1) == y.argmax(1)).float().mean().item()
    known = [k for k in range(y.size(1)) if y[:, k].any()]
    values = [average_precision_score(y[:, k], scores[:, k]) for k in known]
    return 100 * float(np.mean(values))


# ------------------------------------------------------------
# Every frame has a say: batches of clips, epochs.


def _by_epochs(
    probe: Probe,
    clips: Clips,
    train: Sequence[str],
    seed: int,
    loss_of: Callable[[Sequence[str]], Tensor],
    errors_of: Callable[[Sequence[str]], np.ndarray],
) -> Score:
    """Train by Adam; keep the epoch with the fewest errors on dev.

    Args:
        probe: what is trained.
        clips: of the task.
        train: those that it learns from.
        seed: of the order of batches.
        loss_of: utterances -> loss.
        errors_of: utterances -> (2, utterances): errors, and of how many.
    """
    optimizer = torch.optim.Adam(probe.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    best: Score | None = None
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(len(train), generator=generator).tolist()
        for start in range(0, len(order), BATCH):
            loss = loss_of([train[i] for i in order[start : start + BATCH]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % EVERY:
            continue
        with torch.no_grad():
            errors = {part: errors_of(clips.utts[part]) for part in HELD_OUT}
        dev, test = (percent(errors[part]) for part in HELD_OUT)
        if best is None or dev < best.dev:
            best = Score(seed, dev, test, probe.layer.softmax(0).tolist())
            found = errors["test"]
    assert best is not None
    best.error = bootstrap(lambda rows: percent(found[:, rows]), clips)
    return best


def percent(errors: np.ndarray) -> float:
    """Errors in percent, of (2, clips): errors, and of how many."""
    wrong, of = errors.sum(1)
    return 100 * float(wrong / of)


def _all_frames(features: Features, utt: str) -> Tensor:
    return torch.from_numpy(np.asarray(features.values[features.rows[utt]]))


def _ctc(task: Task, clips: Clips, features: Features, seed: int) -> Score:
    """Characters, by connectionist temporal classification."""
    index = {char: i + 1 for i, char in enumerate(clips.classes)}  # 0: blank
    texts = {utt: [index[c] for c in clips.labels[utt]] for utt in clips.all}
    train = [u for u in clips.utts["train"] if features.seconds[u] <= LONGEST]
    if not train:
        raise TaskError(f"{task.name}: no training clip of {LONGEST:g} s or less")
    frames = torch.cat([_all_frames(features, utt) for utt in train])
    probe = Probe(*_statistics(frames), len(index) + 1, seed)

    def loss_of(utts: Sequence[str]) -> Tensor:
        parts = [_all_frames(features, utt) for utt in utts]
        scores = probe(torch.cat(parts)).log_softmax(-1)
        scores = nn.utils.rnn.pad_sequence(scores.split([len(p) for p in parts]))
        return F.ctc_loss(
            scores,
            torch.tensor([c for u in utts for c in texts[u]]),
            torch.tensor([len(p) for p in parts]),
            torch.tensor([len(texts[u]) for u in utts]),
            zero_infinity=True,  # a clip with fewer frames than characters
        )

    def errors_of(utts: Sequence[str]) -> np.ndarray:
        paths = [probe(_all_frames(features, u)).argmax(-1).tolist() for u in utts]
        return character_errors(paths, [texts[u] for u in utts])

    return _by_epochs(probe, clips, train, seed, loss_of, errors_of)


def character_errors(
    paths: Sequence[list[int]], texts: Sequence[list[int]]
) -> np.ndarray:
    """Of each clip edits and characters, of the most likely label in every frame."""
    edits = []
    for path, text in zip(paths, texts, strict=True):
        merged = [c for i, c in enumerate(path) if c and (i == 0 or c != path[i - 1])]
        edits.append(edit_distance(merged, text))
    return np.array([edits, [len(text) for text in texts]])


def _frames(task: Task, clips: Clips, features: Features, seed: int) -> Score:
    """The class in every frame of 20 ms, whatever the rate of the features."""
    index = {name: i for i, name in enumerate(clips.classes)}
    answers, seen = {}, {}
    for utt in clips.all:
        labelled = spans(task, utt, clips.labels[utt])
        ends = torch.tensor([end for _, end in labelled])
        seconds = features.seconds[utt]
        asked = min(ends[-1].item(), seconds)  # labels may end before the clip
        middles = (torch.arange(int(asked * FRAMES)) + 0.5) / FRAMES
        classes = torch.tensor([index[name] for name, _ in labelled])
        answers[utt] = classes[torch.searchsorted(ends, middles, right=True)]
        count = len(features.values[features.rows[utt]])
        seen[utt] = (middles / seconds * count).long()

    def frames(utts: Sequence[str]) -> Tensor:
        return torch.cat([_all_frames(features, u)[seen[u]] for u in utts])

    def right(utts: Sequence[str]) -> Tensor:
        return torch.cat([answers[u] for u in utts])

    def errors_of(utts: Sequence[str]) -> np.ndarray:
        counts = [len(answers[u]) for u in utts]
        wrong = (probe(frames(utts)).argmax(1) != right(utts)).split(counts)
        return np.array([[int(w.sum()) for w in wrong], counts])

    train = clips.utts["train"]
    probe = Probe(*_statistics(frames(train)), len(index), seed)
    return _by_epochs(
        probe,
        clips,
        train,
        seed,
        lambda utts: F.cross_entropy(probe(frames(utts)), right(utts)),
        errors_of,
    )
