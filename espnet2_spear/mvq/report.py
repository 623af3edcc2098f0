"""Figures and plots of a trained quantizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet2_spear.mvq.embeddings import EmbeddingSet
from espnet2_spear.mvq.losses import code_usage, entropy
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.training import MVQTrainingConfig

EVALUATED_FRAMES = 5_000


def evaluate(
    quantizer: Quantizer,
    data: EmbeddingSet,
    config: MVQTrainingConfig,
    refine_iters: int = 5,
) -> dict[str, Any]:
    """Measure a quantizer on held-out frames and on as many training frames.

    Returns:
        primitives only: ``config``, ``identity``, and for each of ``train`` and
        ``held_out`` the number of ``frames``, ``relative_error`` (squared error over
        that of the mean vector, standardised if the quantizer is), and per codebook
        ``entropy_bits`` and ``dead`` (entries that no frame uses).
    """
    device = quantizer.mean.device
    parts = {
        "train": data.train_sample(EVALUATED_FRAMES, config.seed),
        "held_out": data.held_out_frames(EVALUATED_FRAMES),
    }
    summary: dict[str, Any] = {
        "identity": quantizer.identity,
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "refine_iters": refine_iters,
        "config": asdict(config),
    }
    for name, frames in parts.items():
        summary[name] = _measure(quantizer, frames.to(device), refine_iters)
    return summary


@torch.no_grad()
def _measure(quantizer: Quantizer, frames: Tensor, refine_iters: int) -> dict[str, Any]:
    codes = quantizer.encode(frames, refine_iters)
    x = quantizer.standardise(frames)
    usage = code_usage(codes, quantizer.codebook_size)
    return {
        "frames": len(frames),
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
    folder: Path, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]
) -> None:
    """Write report.json, report.md and, if matplotlib is there, plots.

    Args:
        folder: made if it is not there.
        summary: from :func:`evaluate`.
        history: of the trainer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**summary, "history": list(history)}, indent=1)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    plots = _plot(folder, summary, history)
    (folder / "report.md").write_text(_page(summary, plots), encoding="utf-8")


def _page(summary: Mapping[str, Any], plots: Sequence[str]) -> str:
    bits = summary["num_codebooks"] * (summary["codebook_size"] - 1).bit_length()
    lines = [
        f"# Quantizer {summary['identity']}",
        "",
        f"{summary['num_codebooks']} codebooks of {summary['codebook_size']} entries "
        f"({bits} bits) for frames of {summary['dim']}; "
        f"{summary['refine_iters']} refinement passes.",
        "",
        "| frames | number | relative reconstruction error | usage entropy, bits "
        "(mean, min) | dead entries |",
        "|---|---|---|---|---|",
    ]
    for name in ("train", "held_out"):
        part = summary[name]
        bits_used = part["entropy_bits"]
        lines.append(
            f"| {name.replace('_', ' ')} | {part['frames']} "
            f"| {part['relative_error']:.4f} "
            f"| {sum(bits_used) / len(bits_used):.2f}, {min(bits_used):.2f} "
            f"| {sum(part['dead'])} |"
        )
    lines += ["", "| codebook | entropy, bits | dead entries |", "|---|---|---|"]
    train = summary["train"]
    lines += [
        f"| {n} | {bits:.2f} | {dead} |"
        for n, (bits, dead) in enumerate(
            zip(train["entropy_bits"], train["dead"], strict=True)
        )
    ]
    lines += ["", "Options: " + json.dumps(summary["config"]), ""]
    for plot in plots:
        lines += [f"![{plot}]({plot})", ""]
    if not plots:
        lines += ["No plots: matplotlib was not installed.", ""]
    return "\n".join(lines)


def _plot(
    folder: Path, summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]
) -> list[str]:
    """Write the plots; returns their names, none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning(
            "no plots in the report: matplotlib is missing (pip install matplotlib)"
        )
        return []
    figure = Figure(figsize=(10, 4), layout="constrained")
    error, logprob = figure.subplots(1, 2)
    steps = [entry["step"] for entry in history]
    error.plot(steps, [entry["reconstruction"] for entry in history])
    error.set(xlabel="step", ylabel="relative reconstruction error", yscale="log")
    logprob.plot(steps, [entry["logprob"] for entry in history])
    logprob.set(xlabel="step", ylabel="-log p(code), nats")
    for axes in (error, logprob):
        axes.axvline(summary["config"]["iters_phase1"], color="grey", linestyle=":")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "training.png", dpi=100)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    train = summary["train"]
    axes.bar(range(len(train["entropy_bits"])), train["entropy_bits"])
    axes.axhline((summary["codebook_size"] - 1).bit_length(), color="grey")
    axes.set(xlabel="codebook", ylabel="usage entropy, bits")
    figure.savefig(folder / "usage.png", dpi=100)
    return ["training.png", "usage.png"]
