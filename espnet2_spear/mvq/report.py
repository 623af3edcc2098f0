"""Figures of a quantizer, and a page on one or on two side by side.

Errors and usage of codes are measured by :func:`evaluate`; :func:`write_report` writes
them as JSON, as Markdown and as plots.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet2_spear.fileio.atomic import write_atomically, write_json
from espnet2_spear.fileio.tables import markdown_table
from espnet2_spear.mvq.embedding_set import TrainingFrames
from espnet2_spear.mvq.quantizer import AbsQuantizer
from espnet2_spear.mvq.training import code_usage, entropy

Summary = Mapping[str, Any]
EVALUATED_FRAMES = 5_000
MORE_PASSES = (10, 20)  # beside all up to the quantizer's own number
PLOTS = ("error.png", "codebooks.png")


@torch.no_grad()
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
        frames uses); for ``held_out`` also ``passes`` ([passes, error] pairs).
    """
    device = quantizer.mean.device
    chosen = quantizer.passes(refine_iters)
    train = data.train_sample(EVALUATED_FRAMES, seed).to(device)
    held_out = data.held_out_frames(EVALUATED_FRAMES).to(device)
    own = quantizer.default_refine_iters
    passes = (*range(own + 1), *(MORE_PASSES if own else ()))
    errors = [_measure(quantizer, held_out, n)["relative_error"] for n in passes]
    return {
        "identity": quantizer.identity,
        "kind": quantizer.kind,
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "refine_iters": chosen,
        "frame_rate": data.index.get("frame_rate"),
        "train": _measure(quantizer, train, chosen),
        "held_out": {
            **_measure(quantizer, held_out, chosen),
            "passes": list(zip(passes, errors, strict=True)),
        },
    }


def _measure(quantizer: AbsQuantizer, frames: Tensor, passes: int) -> dict[str, Any]:
    codes = quantizer.encode(frames, passes)
    x = quantizer.standardise(frames)
    usage = code_usage(codes, quantizer.codebook_size)
    return {
        "frames": len(x),
        "relative_error": relative_error(x, quantizer.sum_centers(codes)),
        "entropy_bits": code_entropy_bits(usage).tolist(),
        "dead": (usage == 0).sum(dim=1).tolist(),
    }


def relative_error(x: Tensor, approximation: Tensor) -> float:
    """Squared error relative to that of the mean of x; both (B, D)."""
    spread = (x - x.mean(dim=0)).square().sum()
    return float((approximation - x).square().sum() / spread)


def code_entropy_bits(usage: Tensor) -> Tensor:
    """Entropy (N,) in bits of how often codes occur, counts (N, K)."""
    probs = usage / usage.sum(dim=1, keepdim=True)
    return entropy(probs) / torch.log(torch.tensor(2.0))


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
    content = {"quantizers": dict(summaries), "history": list(history)}
    write_json(folder / "report.json", content)
    plots = _plot(folder, summaries, history)
    write_atomically(folder / "report.md", _page(summaries, plots).encode())


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
    def side_by_side(head: str, column: Callable[[Summary], Mapping[Any, str]]) -> str:
        """Table of one column a quantizer, whose entries have names or numbers."""
        columns = [column(summary) for summary in summaries.values()]
        names = dict.fromkeys(name for entries in columns for name in entries)
        rows = [[str(n), *(entries.get(n, "") for entries in columns)] for n in names]
        return markdown_table([head, *summaries], rows)

    identities = ", ".join(s["identity"] for s in summaries.values())
    title = "Quantizer" if len(summaries) == 1 else "Quantizers"
    blocks = [
        f"# {title} {identities}",
        side_by_side("", _overview),
        "## Error and passes of the search",
        side_by_side("passes", _passes),
    ]
    for name, summary in summaries.items():
        blocks += [f"## Codebooks of {name}", _usage(summary)]
        if "config" in summary:
            blocks.append("Options of its training: " + json.dumps(summary["config"]))
    blocks += [f"![{plot}]({plot})" for plot in plots]
    if not plots:
        blocks.append("No plots: matplotlib was not installed.")
    return "\n\n".join(blocks) + "\n"


def _overview(summary: Summary) -> dict[str, str]:
    train, held_out = summary["train"], summary["held_out"]
    entropies, bits = held_out["entropy_bits"], bits_per_second(summary)
    mean = sum(entropies) / len(entropies)
    return {
        **{key: summary[key] for key in ("file", "embeddings") if key in summary},
        "kind": summary["kind"],
        "identity": summary["identity"],
        "codebooks x entries": f"{summary['num_codebooks']} x "
        f"{summary['codebook_size']}",
        "dimension": str(summary["dim"]),
        "passes of the search": str(summary["refine_iters"]),
        "bits per second: nominal, entropy": (
            "unknown" if bits is None else f"{bits[0]:.0f}, {bits[1]:.0f}"
        ),
        "held-out frames": str(held_out["frames"]),
        "**relative error, held out**": f"{held_out['relative_error']:.4f}",
        "relative error, training frames": f"{train['relative_error']:.4f}",
        "usage entropy, bits: mean, min": f"{mean:.2f}, {min(entropies):.2f}",
        "dead entries, training frames": str(sum(train["dead"])),
    }


def _passes(summary: Summary) -> dict[int, str]:
    return {n: f"{error:.4f}" for n, error in summary["held_out"]["passes"]}


def _usage(summary: Summary) -> str:
    columns = (summary["held_out"]["entropy_bits"], summary["train"]["dead"])
    rows = [
        [str(n), f"{bits:.2f}", str(dead)]
        for n, (bits, dead) in enumerate(zip(*columns, strict=True))
    ]
    return markdown_table(["codebook", "entropy, bits", "dead entries"], rows)


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
    figures = {name: Figure(figsize=(10, 4), layout="constrained") for name in PLOTS}
    passes = figures["error.png"].subplots()
    usages = figures["codebooks.png"].subplots(1, len(summaries), squeeze=False)[0]
    for (name, summary), bars in zip(summaries.items(), usages, strict=True):
        held_out = summary["held_out"]
        passes.plot(*zip(*held_out["passes"], strict=True), marker=".", label=name)
        bits = held_out["entropy_bits"]
        bars.bar(range(len(bits)), bits)
        bars.axhline((summary["codebook_size"] - 1).bit_length(), color="grey")
        bars.set(title=name, xlabel="codebook", ylabel="usage entropy, bits")
    passes.set(xlabel="passes of the search", ylabel="relative error, held out")
    passes.grid(alpha=0.3)
    passes.legend()
    if history:
        figures["training.png"] = Figure(figsize=(10, 4), layout="constrained")
        error, logprob = figures["training.png"].subplots(1, 2)
        steps = [entry["step"] for entry in history]
        for axes, key in ((error, "reconstruction"), (logprob, "logprob")):
            axes.plot(steps, [entry[key] for entry in history])
            axes.grid(alpha=0.3)
        error.set(xlabel="step", ylabel="relative reconstruction error", yscale="log")
        logprob.set(xlabel="step", ylabel="-log p(code), nats")
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=100)
    return list(figures)
