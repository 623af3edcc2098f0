"""Training of both libraries' quantizers on the same embeddings, in one run."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import timed
from peer import load_peer, peer_codes
from torch import Tensor

from espnet2_spear.fileio.tables import markdown_table
from espnet2_spear.mvq.embedding_set import EmbeddingSet
from espnet2_spear.mvq.quantizer import Quantizer
from espnet2_spear.mvq.report import relative_error
from espnet2_spear.mvq.training import MVQTrainer, MVQTrainingConfig

BLOCK = 10  # steps of either in turn


class PeerTraining:
    """The library's trainer, fed with our batches; only its steps are timed."""

    def __init__(self, peer, trainer: MVQTrainer, config: MVQTrainingConfig) -> None:
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.ours, self.config = trainer, config
        self.trainer = peer.QuantizerTrainer(
            dim=trainer.data.dim,
            bytes_per_frame=config.num_codebooks,
            device=trainer.device,
            phase_one_iters=config.iters_phase1,
            phase_two_iters=config.iters_phase2,
            lr=config.lr,
        )
        # Ours is another object in phase 2, with the same statistics.
        self.mean, self.std = trainer.quantizer.mean, trainer.quantizer.std
        self.seconds, self.steps = 0.0, 0

    def run(self, steps: int) -> None:
        """Take steps, as many as are left at most."""
        for _ in range(steps):
            if self.trainer.done():
                return
            data, config = self.ours.data, self.config
            batch = data.train_batch(config.batch_frames, config.seed, self.steps)
            x = (batch.to(self.ours.device) - self.mean) / self.std
            self.seconds += timed(partial(self.trainer.step, x), self.ours.device)[0]
            self.steps += 1


def compare_training(args: argparse.Namespace) -> None:
    """Train both in turns of a few steps, so that both see the same machine."""
    peer = load_peer(args.peer)
    data = EmbeddingSet(args.embeddings, seed=args.seed)
    config = MVQTrainingConfig(
        num_codebooks=args.num_codebooks,
        iters_phase1=args.iters,
        iters_phase2=args.iters,
        batch_frames=args.batch_frames,
        lr=args.lr,
        seed=args.seed,
    )
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MVQTrainer(
            config, data, Path(folder) / "checkpoint", device, log_interval=BLOCK
        )
        other = None if peer is None else PeerTraining(peer, trainer, config)
        paused = 0.0

        def turn(_: str) -> None:
            nonlocal paused
            start = time.perf_counter()
            if other is not None:
                other.run(BLOCK)
            paused += time.perf_counter() - start

        total, quantizer = timed(lambda: trainer.train(turn), device)
    seconds = {"ours": total - paused}
    frames = data.held_out_frames(args.eval_frames).to(device)
    x = quantizer.standardise(frames)
    errors = {"ours": _error(quantizer, x, quantizer.encode(frames))}
    if other is not None:
        other.run(config.total_iters)  # it asks for one step more than both phases
        theirs = other.trainer.get_quantizer().eval()
        codes = peer_codes(theirs, x, 5, 64)
        with torch.no_grad():
            errors["library"] = relative_error(x, theirs.decode(codes))
        seconds["library"] = other.seconds
    print(
        f"{data.num_train} frames of {data.dim}, N={config.num_codebooks}, 2 x "
        f"{args.iters} steps of {config.batch_frames} frames, {device}, "
        f"{args.num_threads} threads; relative error of {len(x)} held-out frames "
        "after 5 passes\n"
    )
    rows = [[n, f"{error:.4f}", f"{seconds[n]:.1f}"] for n, error in errors.items()]
    print(markdown_table(["", "held-out relative error", "seconds"], rows))
    if other is not None:
        print(
            f"\ntime: {seconds['ours'] / seconds['library']:.3f} of the library's, "
            "with our reading of batches and without the library's"
        )


@torch.no_grad()
def _error(quantizer: Quantizer, x: Tensor, codes: Tensor) -> float:
    return relative_error(x, quantizer.sum_centers(codes))
