"""The baseline of benchmarks/pretraining.py: the same model, written the plain way.

Prediction heads that make all logits of a batch at once, statistics that are read back
one by one as ESPnet's SSL model does, and a ScaledAdam that loops over parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet2_spear.codes.targets import match_frame_rate
from espnet2_spear.spear.model import SpearPretrainModel


class PlainModel(nn.Module):
    """The student of a SpearPretrainModel with linear heads.

    Args:
        model: whose student, masks and tables are used; its heads are not.
    """

    def __init__(self, model: SpearPretrainModel) -> None:
        super().__init__()
        self.student = model.student
        self.masker = model.masker
        self.teachers = model.teachers
        self.register_buffer("loss_weights", model.loss_weights.clone())
        rate = self.student.config.frame_rate
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(
                    self.student.output_size(),
                    t.num_codebooks * t.per_student_frame(rate) * t.codebook_size,
                )
                for name, t in self.teachers.items()
            }
        )

    def forward(
        self, speech: Tensor, speech_lengths: Tensor, domain: Tensor, **kwargs: Tensor
    ) -> tuple[Tensor, dict[str, float], Tensor]:
        """Loss by frames, statistics and weight, as of SpearPretrainModel."""
        fbank, fbank_lens = self.student.fbank(speech, speech_lengths)
        fbank, mask = self.masker(fbank, fbank_lens, self.student.mask_emb)
        out = self.student.encode(fbank, fbank_lens)
        hidden = out.encoder_out
        position = torch.arange(hidden.size(1), device=hidden.device)
        valid = position < out.encoder_out_lens[:, None].to(hidden.device)
        rate = self.student.config.frame_rate
        loss = hidden.new_zeros((), dtype=torch.float32)
        stats = {"mask_ratio": mask.float().mean().item()}
        for index, (name, teacher) in enumerate(self.teachers.items()):
            targets = match_frame_rate(
                kwargs[f"codes_{name}"], teacher.frame_rate, rate, hidden.size(1)
            )
            targets = targets.masked_fill(~valid[..., None], -1)
            logits = self.heads[name](hidden)
            logits = logits.unflatten(-1, (-1, teacher.codebook_size)).float()
            entropy = F.cross_entropy(
                logits.flatten(0, 2),
                targets.flatten(),
                ignore_index=-1,
                reduction="none",
            ).view(targets.shape)
            weight = self.loss_weights[domain.reshape(-1), index]
            loss = loss + (entropy.mean(dim=-1) * weight[:, None]).sum()
            known = targets >= 0
            correct = (logits.argmax(dim=-1) == targets) & known
            stats[f"{name}_loss"] = (entropy.sum() / known.sum()).item()
            stats[f"{name}_acc"] = (correct.sum() / known.sum()).item()
        frames = valid.sum()
        return loss / frames, stats, frames


class PlainScaledAdam(torch.optim.Optimizer):
    """ScaledAdam as one writes it first: a loop over parameters.

    Args:
        params: parameters.
        lr: learning rate.
        clipping_scale: multiple of the median norm of the last 100 steps.
        betas: decay of the update's momentum and of the second moment.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.045,
        clipping_scale: float = 2.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})
        self.clipping_scale = clipping_scale
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Do one step."""
        clip = self._clip()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad * clip, group["lr"], *group["betas"])

    def _clip(self) -> float:
        total = 0.0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    rms = self.state[p].get("rms", _rms(p))
                    grad = p.grad * rms if p.numel() > 1 else p.grad
                    total += grad.square().sum()
        norm = float(total) ** 0.5
        self.norms = [*self.norms[-99:], norm]
        if len(self.norms) < 100:
            return 1.0
        threshold = self.clipping_scale * sorted(self.norms)[50]
        return min(1.0, threshold / (norm + 1e-20))

    def _update(
        self, p: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float
    ) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["delta"], state["second"] = torch.zeros_like(p), torch.zeros_like(p)
            state["rms"], state["scale_second"] = _rms(p), torch.zeros(())
            state["scale_grads"] = torch.zeros(4)
        step, delta, second = state["step"], state["delta"], state["second"]
        state["step"] += 1
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (second / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
        if p.numel() == 1:
            delta.mul_(beta1).add_(grad / denominator, alpha=-0.1 * lr * (1 - beta1))
            p.clamp_(-10.0, 10.0).add_(delta)
            return
        delta.mul_(beta1)
        state["scale_grads"][step % 4] = (p * grad).sum()
        if step % 4 == 3:
            state["rms"] = rms = _rms(p)
            beta = beta2**4
            grads = state["scale_grads"].to(p.device)
            scale_second = state["scale_second"].to(p.device)
            scale_second = beta * scale_second + (1 - beta) * grads.square().mean()
            state["scale_second"] = scale_second
            correction = (1 - beta ** ((step + 1) // 4)) ** 0.5
            change = -0.1 * lr * correction * grads.sum() / (scale_second.sqrt() + 1e-8)
            change = change.clamp(max=(3.0 - rms) / rms) * (rms >= 1e-5)
            delta.add_(p * change, alpha=1 - beta1)
        size = state["rms"].clamp(min=1e-5)
        delta.add_(grad / denominator * size, alpha=-lr * (1 - beta1))
        p.add_(delta)


def _rms(p: Tensor) -> Tensor:
    return p.square().mean().sqrt()
