"""The transducer's loss by torchaudio, where warprnnt_pytorch is not installed.

ESPnet's models with a transducer import ``warprnnt_pytorch.RNNTLoss``, a package that
is in no registry and must be compiled; they offer no other full-sum loss. Where it is
absent, the plugin puts this module in its place (see ``espnet2_spear.registration``).

Memory: the joint network's output, float32 (batch, frames, tokens + 1, vocabulary), and
its gradient, that is, 8 bytes for each of its values. 1000 s of speech at 25 Hz in
utterances of 15 s with 60 tokens of 500 are 6.1 GB; the published scripts prune it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

PACKAGE = "warprnnt_pytorch"


class RNNTLoss(torch.nn.Module):
    """Full-sum transducer loss (arXiv 1211.3711) with warprnnt_pytorch's interface.

    Args:
        blank: index of the blank.
        reduction: mean or sum over utterances, or none.
        fastemit_lambda: must be 0; torchaudio has no FastEmit.

    Raises:
        ImportError: torchaudio is absent, or has this loss no more.
        ValueError: FastEmit is asked for.
    """

    def __init__(
        self, blank: int = 0, reduction: str = "mean", fastemit_lambda: float = 0.0
    ) -> None:
        super().__init__()
        if fastemit_lambda:
            raise ValueError(
                f"fastemit_lambda {fastemit_lambda}: torchaudio's transducer loss has "
                f"none; set it to 0, or compile and install {PACKAGE}"
            )
        self.blank, self.reduction = blank, reduction
        _loss()

    def forward(
        self, logits: Tensor, targets: Tensor, frames: Tensor, tokens: Tensor
    ) -> Tensor:
        """Return the loss.

        Args:
            logits: (batch, frames, tokens + 1, vocabulary), not normalised.
            targets: (batch, tokens), padded with anything.
            frames: (batch,), of each utterance.
            tokens: (batch,), of each utterance.
        """
        lengths = targets.int(), frames.int(), tokens.int()
        # Under autocast they may have 16 bits.
        return _loss()(
            logits.float(), *lengths, blank=self.blank, reduction=self.reduction
        )


def _loss():  # noqa: ANN202 (torchaudio is imported when it is needed)
    try:
        from torchaudio.functional import rnnt_loss
    except ImportError as error:
        raise ImportError(
            "a transducer needs torchaudio's rnnt_loss (pip install torchaudio, as new "
            f"as torch) or {PACKAGE}, which must be compiled: {error}"
        ) from error
    return rnnt_loss


def main() -> None:
    """Say with which loss a transducer will be trained, or fail in a line."""
    import importlib.util

    if importlib.util.find_spec(PACKAGE) is not None:
        print(f"transducer loss: {PACKAGE}")
        return
    try:
        _loss()
    except ImportError as error:
        sys.exit(f"ERROR: {error}")
    print("transducer loss: torchaudio's; 8 bytes a value of the joint network")


if __name__ == "__main__":
    main()
