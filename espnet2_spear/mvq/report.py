"""Figures of a quantizer, and a page on one or on two side by side.

Errors, usage of codes and what each codebook contributes are measured by
:func:`evaluate`; :func:`write_report` writes them as JSON, as Markdown and as plots.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espnet2_spear.mvq.embeddings import TrainingFrames
from espnet2_spear.mvq.quantizer import AbsQuantizer
from espnet2_spear.mvq.training import code_usage, entropy

Summary = Mapping[str, Any]
EVALUATED_FRAMES = 5_000
CHUNK = 256
MORE_PASSES = (10, 20)  # beside all up to the quantizer's own number


def evaluate(
    quantizer: AbsQuantizer,
    data: TrainingFrames,
    seed: int = 0,
    refine_iters: int | None = None,
) -> dict[str, Any]:
    """Measure a quantizer on held-out frames and on as many training frames.

    Args:
        quantizer: in eval mode.
        data: embeddings.
        seed: of the choice of training frames.
        refine_iters: passes of the search; the quantizer's own number for None.

    Returns:
        primitives only: ``identity``, ``kind``, sizes, ``frame_rate`` (Hz, may be
        None), and for each of ``train`` and ``held_out`` the number of ``frames``,
        ``relative_error`` (see :func:`relative_error`, standardised if the quantizer
        is), and per codebook ``entropy_bits`` and ``dead`` (entries that none of these
        frames uses); for ``held_out`` also ``passes`` ([passes, error] pairs),
        ``codebooks`` (:meth:`Contributions.greedy`) and ``correlation`` (N, N).
    """
    device = quantizer.mean.device
    passes = quantizer.passes(refine_iters)
    summary: dict[str, Any] = {
        "identity": quantizer.identity,
        "kind": quantizer.kind,
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "refine_iters": passes,
        "frame_rate": data.index.get("frame_rate"),
    }
    frames = data.train_sample(EVALUATED_FRAMES, seed).to(device)
    codes = quantizer.encode(frames, passes)
    summary["train"] = _basic(quantizer, quantizer.standardise(frames), codes)
    frames = data.held_out_frames(EVALUATED_FRAMES).to(device)
    codes = quantizer.encode(frames, passes)
    x = quantizer.standardise(frames)
    parts = contributions(quantizer, x, codes)
    summary["held_out"] = {
        **_basic(quantizer, x, codes),
        "passes": _error_by_passes(quantizer, frames),
        "codebooks": parts.greedy(),
        "correlation": parts.correlation().tolist(),
    }
    return summary


@torch.no_grad()
def _basic(quantizer: AbsQuantizer, x: Tensor, codes: Tensor) -> dict[str, Any]:
    usage = code_usage(codes, quantizer.codebook_size)
    return {
        "frames": len(x),
        "relative_error": relative_error(x, quantizer.sum_centers(codes)),
        "entropy_bits": code_entropy_bits(usage).tolist(),
        "dead": (usage == 0).sum(dim=1).tolist(),
    }


@torch.no_grad()
def _error_by_passes(
    quantizer: AbsQuantizer, frames: Tensor
) -> list[tuple[int, float]]:
    own = quantizer.default_refine_iters
    counts = [*range(own + 1), *(MORE_PASSES if own else ())]
    x = quantizer.standardise(frames)
    return [
        (
            passes,
            relative_error(x, quantizer.sum_centers(quantizer.encode(frames, passes))),
        )
        for passes in counts
    ]


def relative_error(x: Tensor, approximation: Tensor) -> float:
    """Squared error relative to that of the mean of x; both (B, D)."""
    spread = (x - x.mean(dim=0)).square().sum()
    return float((approximation - x).square().sum() / spread)


def code_entropy_bits(usage: Tensor) -> Tensor:
    """Entropy (N,) in bits of how often codes occur, counts (N, K)."""
    probs = usage / usage.sum(dim=1, keepdim=True)
    return entropy(probs) / torch.log(torch.tensor(2.0))


class Contributions(NamedTuple):
    """Inner products of what each codebook contributes to a sum, its mean removed.

    Attributes:
        spread: squared length of the vectors themselves, their mean removed.
        with_x: (N,) products with the vectors.
        gram: (N, N) products with each other. All are sums over vectors, float64.
    """

    spread: float
    with_x: Tensor
    gram: Tensor

    def error(self, used: list[int]) -> float:
        """Relative error if only some codebooks are used, the others by their mean."""
        if not used:
            return 1.0
        gram = self.gram[used][:, used].sum()
        return 1.0 + float(gram - 2 * self.with_x[used].sum()) / self.spread

    def greedy(self) -> list[tuple[int, float]]:
        """[codebook, error] as one more codebook is used, the best next one each time.

        The error is up to the mean of the vectors, which the sums need not hit.
        """
        left = list(range(len(self.with_x)))
        used: list[int] = []
        result: list[tuple[int, float]] = []
        while left:
            best = min(left, key=lambda n: self.error([*used, n]))
            left.remove(best)
            used.append(best)
            result.append((best, self.error(used)))
        return result

    def correlation(self) -> Tensor:
        """Correlation (N, N) of contributions; 0 for a codebook that has only one."""
        length = self.gram.diagonal().sqrt()
        return self.gram / (length[:, None] * length).clamp(min=1e-30)


@torch.no_grad()
def contributions(quantizer: AbsQuantizer, x: Tensor, codes: Tensor) -> Contributions:
    """Measure what codebooks contribute.

    Args:
        quantizer: any.
        x: standardised vectors (B, D).
        codes: theirs, (B, N).
    """
    centers = quantizer.scaled_centers()
    usage = code_usage(codes, quantizer.codebook_size) / len(codes)
    centers = centers - torch.einsum("nk,nkd->nd", usage, centers).unsqueeze(1)
    x = x - x.mean(dim=0)
    number = torch.arange(quantizer.num_codebooks, device=x.device)
    with_x = x.new_zeros(len(number), dtype=torch.float64)
    gram = x.new_zeros(len(number), len(number), dtype=torch.float64)
    for part, part_codes in zip(x.split(CHUNK), codes.split(CHUNK), strict=True):
        chosen = centers[number, part_codes]  # (b, N, D)
        with_x += torch.einsum("bnd,bd->n", chosen, part)
        gram += torch.einsum("bnd,bmd->nm", chosen, chosen)
    return Contributions(float(x.double().square().sum()), with_x.cpu(), gram.cpu())


def write_report(
    folder: Path,
    summaries: Mapping[str, Summary],
    history: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write report.json, report.md and, if matplotlib is there, plots.

    Args:
        folder: made if it is not there.
        summaries: name -> result of ``evaluate``, one or two; may have the names of
            the files measured as ``file`` and ``embeddings``, and the options of the
            training as ``config``.
        history: of the trainer, if the quantizer has just been trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"quantizers": dict(summaries), "history": list(history)}
    text = json.dumps(content, indent=1)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    plots = _plot(folder, summaries, history)
    (folder / "report.md").write_text(_page(summaries, plots), encoding="utf-8")


def bits_per_second(summary: Summary) -> tuple[float, float] | None:
    """Nominal bits, and entropy of the held-out codes, per second; None if unknown.

    The entropy is the sum of the codebooks', an upper bound of the codes' own.
    """
    rate = summary["frame_rate"]
    if not rate:
        return None
    nominal = summary["num_codebooks"] * (summary["codebook_size"] - 1).bit_length()
    return rate * nominal, rate * sum(summary["held_out"]["entropy_bits"])


def _page(summaries: Mapping[str, Summary], plots: Sequence[str]) -> str:
    identities = ", ".join(s["identity"] for s in summaries.values())
    title = "Quantizer" if len(summaries) == 1 else "Quantizers"
    blocks = [f"# {title} {identities}", _overview(summaries)]
    blocks += [f"## Error and passes of the search\n\n{_passes(summaries)}"]
    blocks += [
        "## Error and number of codebooks\n\nThe next codebook is always the one that "
        "helps most; those not yet used stand for their mean.\n\n"
        + _codebooks(summaries)
    ]
    for name, summary in summaries.items():
        blocks.append(f"## Codebooks of {name}\n\n{_usage(summary)}")
        if "config" in summary:
            blocks.append("Options of its training: " + json.dumps(summary["config"]))
    blocks += [f"![{plot}]({plot})" for plot in plots]
    if not plots:
        blocks.append("No plots: matplotlib was not installed.")
    return "\n\n".join(blocks) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _overview(summaries: Mapping[str, Summary]) -> str:
    def row(name: str, value) -> list[str]:
        return [name, *(value(summary) for summary in summaries.values())]

    def usage(summary: Summary) -> str:
        bits = summary["held_out"]["entropy_bits"]
        return f"{sum(bits) / len(bits):.2f}, {min(bits):.2f}"

    def rate(summary: Summary) -> str:
        bits = bits_per_second(summary)
        return "unknown" if bits is None else f"{bits[0]:.0f}, {bits[1]:.0f}"

    rows = [
        row(key, lambda s, key=key: s.get(key, ""))
        for key in ("file", "embeddings")
        if any(key in summary for summary in summaries.values())
    ]
    rows += [
        row("kind", lambda s: s["kind"]),
        row("identity", lambda s: s["identity"]),
        row("codebooks x entries", lambda s: _size(s)),
        row("dimension", lambda s: str(s["dim"])),
        row("passes of the search", lambda s: str(s["refine_iters"])),
        row("bits per second: nominal, entropy", rate),
        row("held-out frames", lambda s: str(s["held_out"]["frames"])),
        row("**relative error, held out**", lambda s: _error(s["held_out"])),
        row("relative error, training frames", lambda s: _error(s["train"])),
        row("usage entropy, bits: mean, min", usage),
        row("dead entries, training frames", lambda s: str(sum(s["train"]["dead"]))),
    ]
    return _table(["", *summaries], rows)


def _size(summary: Summary) -> str:
    return f"{summary['num_codebooks']} x {summary['codebook_size']}"


def _error(part: Summary) -> str:
    return f"{part['relative_error']:.4f}"


def _passes(summaries: Mapping[str, Summary]) -> str:
    errors = [dict(s["held_out"]["passes"]) for s in summaries.values()]
    counts = sorted(set().union(*errors))
    rows = [
        [str(n), *(f"{e[n]:.4f}" if n in e else "" for e in errors)] for n in counts
    ]
    return _table(["passes", *summaries], rows)


def _codebooks(summaries: Mapping[str, Summary]) -> str:
    errors = [s["held_out"]["codebooks"] for s in summaries.values()]
    rows = [
        [
            str(n + 1),
            *(f"{e[n][1]:.4f} (+{e[n][0]})" if n < len(e) else "" for e in errors),
        ]
        for n in range(max(map(len, errors)))
    ]
    return _table(["codebooks", *summaries], rows)


def _usage(summary: Summary) -> str:
    train, held_out = summary["train"], summary["held_out"]
    others = [
        max((abs(v) for m, v in enumerate(row) if m != n), default=0.0)
        for n, row in enumerate(held_out["correlation"])
    ]
    columns = (held_out["entropy_bits"], train["dead"], others)
    rows = [
        [str(n), f"{bits:.2f}", str(dead), f"{correlation:.2f}"]
        for n, (bits, dead, correlation) in enumerate(zip(*columns, strict=True))
    ]
    head = ["codebook", "entropy, bits", "dead entries", "largest correlation"]
    return _table(head, rows)


def _plot(
    folder: Path,
    summaries: Mapping[str, Summary],
    history: Sequence[Mapping[str, float]],
) -> list[str]:
    """Write the plots; returns their names, none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning(
            "no plots in the report: matplotlib is missing (pip install matplotlib)"
        )
        return []
    names = []

    def save(figure: Figure, name: str) -> None:
        figure.savefig(folder / name, dpi=100)
        names.append(name)

    figure = Figure(figsize=(10, 4), layout="constrained")
    passes, codebooks = figure.subplots(1, 2, sharey=True)
    for name, summary in summaries.items():
        held_out = summary["held_out"]
        passes.plot(*zip(*held_out["passes"], strict=True), marker=".", label=name)
        errors = [error for _, error in held_out["codebooks"]]
        codebooks.plot(range(1, len(errors) + 1), errors, marker=".", label=name)
    passes.set(xlabel="passes of the search", ylabel="relative error, held out")
    codebooks.set(xlabel="codebooks used")
    for axes in (passes, codebooks):
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, "error.png")

    count = len(summaries)
    figure = Figure(figsize=(6 * count, 8), layout="constrained")
    rows = figure.subplots(2, count, squeeze=False)
    for (name, summary), bars, image in zip(summaries.items(), *rows, strict=True):
        bits = summary["held_out"]["entropy_bits"]
        bars.bar(range(len(bits)), bits)
        bars.axhline((summary["codebook_size"] - 1).bit_length(), color="grey")
        bars.set(title=name, xlabel="codebook", ylabel="usage entropy, bits")
        shown = image.imshow(
            summary["held_out"]["correlation"], cmap="RdBu", vmin=-1, vmax=1
        )
        image.set(title="correlation of contributions", xlabel="codebook")
        figure.colorbar(shown, ax=image)
    save(figure, "codebooks.png")

    if history:
        figure = Figure(figsize=(10, 4), layout="constrained")
        error, logprob = figure.subplots(1, 2)
        steps = [entry["step"] for entry in history]
        error.plot(steps, [entry["reconstruction"] for entry in history])
        error.set(xlabel="step", ylabel="relative reconstruction error", yscale="log")
        logprob.plot(steps, [entry["logprob"] for entry in history])
        logprob.set(xlabel="step", ylabel="-log p(code), nats")
        for axes in (error, logprob):
            axes.grid(alpha=0.3)
        save(figure, "training.png")
    return names
