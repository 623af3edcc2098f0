"""Prediction heads: one linear classifier per codebook."""

from __future__ import annotations

from torch import Tensor, nn

from espnet2_spear.spear.codebook_loss import CodebookLoss, codebook_loss


class CodebookHead(nn.Linear):
    """N classifiers of K codes each, as one linear layer.

    Args:
        dim: channels D of the frames.
        num_codebooks: N.
        codebook_size: K.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(dim, num_codebooks * codebook_size)
        self.codebook_size = codebook_size

    def forward(
        self, hidden: Tensor, targets: Tensor, frame_weight: Tensor
    ) -> CodebookLoss:
        """Loss of frames (M, D); see :func:`codebook_loss`.

        Through the module, not through its tensors, so that whatever keeps parameters
        elsewhere (DeepSpeed, FSDP) brings them in time.

        Args:
            hidden: (M, D).
            targets: (M, N) int, negative = ignored.
            frame_weight: (M,) float.
        """
        return codebook_loss(hidden, self.weight, self.bias, targets, frame_weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., N, K) of frames (..., D): not for whole batches."""
        return super().forward(hidden).unflatten(-1, (-1, self.codebook_size))
