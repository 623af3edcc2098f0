"""A SPEAR model as teacher of another one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from espnet2_spear.errors import CheckpointError
from espnet2_spear.fileio.hashes import digest_of_parts
from espnet2_spear.hub.load import load_model
from espnet2_spear.teachers.base import Teacher, TeacherError, without_padding


class SpearTeacher(Teacher):
    """One layer, or the output, of a SPEAR model.

    Only utterances of one length are taken together: the model's convolutions let
    padding count.

    Args:
        weights: local checkpoint, ours or in the released layout, as for
            ``espnet2_spear.load_model``.
        layer: k is hidden state k, counted from 1, at 50 Hz; -1 is the output, at the
            model's rate.
        sha256: expected hash of the tensors, as :attr:`weights_sha256` gives it, if it
            is to be checked. (A checkpoint is a folder, so no file is hashed.)
    """

    def __init__(
        self, weights: str, layer: int = -1, sha256: str | None = None
    ) -> None:
        super().__init__()
        try:
            self.model = load_model(weights)
        except CheckpointError as error:
            raise TeacherError(str(error)) from error
        self.weights_sha256 = sha256_of_tensors(self.model.state_dict())
        if sha256 is not None and sha256.lower() != self.weights_sha256:
            raise TeacherError(
                f"{weights}: the SHA-256 of its tensors is {self.weights_sha256}, "
                f"expected {sha256}; it is another checkpoint, or damaged"
            )
        if layer != -1 and not 1 <= layer <= self.model.num_layers:
            raise TeacherError(
                f"{weights}: layer must be -1 or from 1 to {self.model.num_layers}, "
                f"not {layer}"
            )
        self.layer = layer
        self.dim = self.model.output_size()
        self.frame_rate = self.model.config.frame_rate if layer == -1 else 50.0
        self.min_samples = self.model.min_samples

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the model's exact number of frames."""
        if self.layer == -1:
            return self.model.output_lengths(lengths)
        return self.model.hidden_lengths(lengths)

    def embed(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch; see :class:`Teacher`."""
        return without_padding(self._hidden_state, speech, lengths)

    def _hidden_state(self, speech: Tensor) -> Tensor:
        out = self.model(speech, torch.full((len(speech),), speech.size(1)))
        if self.layer == -1:
            return out.encoder_out.float()
        return out.hidden_states[self.layer - 1].float()


def sha256_of_tensors(state: dict[str, Tensor]) -> str:
    """Hash of names, types, shapes and values, whatever file they came from."""

    def parts() -> Iterator[bytes]:
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.flatten().view(torch.uint8).numpy().tobytes()

    return digest_of_parts(parts())
