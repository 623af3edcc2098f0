"""ScaledAdam: Adam whose steps are relative to each parameter's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_NORM_PERIOD = 100  # steps between two updates of the clipping threshold


class ScaledAdam(torch.optim.Optimizer):
    """Optimizer of the Zipformer paper (arXiv 2310.11230, section 3.5).

    Differences from Adam: the step of a tensor is multiplied by its root mean
    square; a second, explicit step learns its scale, from the gradient of the
    logarithm of the scale; momentum is kept on the update; gradients are clipped
    relative to the median norm of the last 100 steps. A constant factor on the
    loss changes nothing. Switch other gradient clipping off (ESPnet:
    ``grad_clip: 1.0e+9``).

    Parameters of equal shape are updated together as one stacked tensor.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups.
        lr: learning rate; 0.045 is usual, with the schedule Eden.
        clipping_scale: gradients are clipped to this multiple of the median
            norm; None switches clipping off.
        betas: decay of the update's momentum and of the second moment.
        scalar_lr_scale: learning rate of scales and of one-element parameters,
            relative to ``lr``.
        eps: added to denominators.
        param_min_rms: tensors smaller than this are treated as this large, and are
            not scaled down any more.
        param_max_rms: the scale step never lets a tensor grow beyond.
        scalar_max: largest magnitude of a one-element parameter.
        size_update_period: steps between two scale updates.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.045,
        clipping_scale: float | None = 2.0,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1.0e-8,
        param_min_rms: float = 1.0e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
    ) -> None:
        if lr < 0 or size_update_period < 1:
            raise ValueError(f"lr {lr} or size_update_period {size_update_period}")
        if clipping_scale is not None and clipping_scale <= 0:
            raise ValueError(f"clipping_scale {clipping_scale} must be positive")
        defaults = dict(
            lr=lr,
            clipping_scale=clipping_scale,
            betas=tuple(betas),
            scalar_lr_scale=scalar_lr_scale,
            eps=eps,
            param_min_rms=param_min_rms,
            param_max_rms=param_max_rms,
            scalar_max=scalar_max,
            size_update_period=size_update_period,
        )
        self._cached: list[list[list[Tensor]]] | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see torch.optim.Optimizer."""
        super().add_param_group(param_group)
        self._cached = None

    def _batches(self) -> list[list[list[Tensor]]]:
        """Trainable parameters of every group, listed by shape.

        The first parameter of a list owns the state of the whole list.
        """
        if self._cached is None:
            self._cached = []
            for group in self.param_groups:
                by_shape: dict[tuple, list[Tensor]] = {}
                for p in group["params"]:
                    if p.requires_grad:
                        key = (p.dtype, p.device, p.shape)
                        by_shape.setdefault(key, []).append(p)
                self._cached.append(list(by_shape.values()))
        return self._cached

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Do one step; a parameter without a gradient counts as gradient 0."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group, batches in zip(self.param_groups, self._batches(), strict=True):
            for params in batches:
                if all(p.grad is None for p in params):
                    continue
                grads = [
                    torch.zeros_like(p) if p.grad is None else p.grad for p in params
                ]
                if any(g.is_sparse for g in grads):
                    raise RuntimeError("ScaledAdam does not support sparse gradients")
                grad, value = torch.stack(grads), torch.stack(params)
                state = self.state[params[0]]
                if not state:
                    self._init_state(state, group, value)
                work.append((group, params, value, grad, state))
        clip = self._clipping_factor(work)
        for group, params, value, grad, state in work:
            if clip is not None:
                grad = grad * clip
            if value[0].numel() == 1:
                self._step_scalars(group, value, grad, state)
            else:
                self._step_tensors(group, value, grad, state)
            state["step"] += 1
            torch._foreach_copy_(params, list(value.unbind()))
        return loss

    @staticmethod
    def _init_state(state: dict[str, Any], group: dict, value: Tensor) -> None:
        state["step"] = 0
        state["delta"] = torch.zeros_like(value)
        state["exp_avg_sq"] = torch.zeros_like(value)
        if value[0].numel() > 1:
            rms = _rms(value)
            state["param_rms"] = rms
            state["scale_exp_avg_sq"] = torch.zeros_like(rms)
            period = group["size_update_period"]
            state["scale_grads"] = rms.new_zeros(period, *rms.shape)

    def _clipping_factor(self, work: list[tuple]) -> Tensor | None:
        """Return min(1, threshold / norm), or None while there is no threshold.

        The norm is of gradients times the sizes of their parameters, so that it
        measures the effect of a unit relative step. Everything stays on the
        device: no synchronisation.
        """
        if not work or self.param_groups[0]["clipping_scale"] is None:
            return None
        device = work[0][2].device
        total = torch.zeros((), device=device)
        for _, _, value, grad, state in work:
            if value[0].numel() > 1:
                grad = grad * state["param_rms"]
            total += grad.float().square().sum().to(device)
        norm = total.sqrt()
        owner = work[0][4]
        step = owner["step"]
        if "model_norms" not in owner:
            owner["model_norms"] = torch.zeros(_NORM_PERIOD, device=device)
        owner["model_norms"][step % _NORM_PERIOD] = norm
        if step < _NORM_PERIOD:
            return None
        if step % _NORM_PERIOD == 0:
            median = owner["model_norms"].sort()[0][_NORM_PERIOD // 2]
            scale = self.param_groups[0]["clipping_scale"]
            owner["model_norm_threshold"] = scale * median
        return (owner["model_norm_threshold"] / (norm + 1e-20)).clamp(max=1.0)

    @staticmethod
    def _step_tensors(group: dict, value: Tensor, grad: Tensor, state: dict) -> None:
        """Update a stack of tensors in place: relative step and scale step."""
        beta1, beta2 = group["betas"]
        step, period = state["step"], group["size_update_period"]
        delta, rms = state["delta"], state["param_rms"]
        delta.mul_(beta1)
        dims = tuple(range(1, value.dim()))
        state["scale_grads"][step % period] = (value * grad).sum(dims, keepdim=True)
        if step % period == period - 1:
            rms.copy_(_rms(value))
            scale_step = ScaledAdam._scale_step(group, state)
            delta.addcmul_(value, scale_step, value=1 - beta1)
        second = state["exp_avg_sq"]
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta2 ** (step + 1)
        if correction >= 0.99:  # as the reference, which stops correcting here
            correction = 1.0
        denominator = (second / correction).sqrt_().add_(group["eps"])
        size = rms.clamp(min=group["param_min_rms"]) * (-group["lr"] * (1 - beta1))
        delta.add_(grad.div(denominator).mul_(size))
        value.add_(delta)

    @staticmethod
    def _scale_step(group: dict, state: dict) -> Tensor:
        """Relative change of the scales, from the gradients of the last steps."""
        period, rms = group["size_update_period"], state["param_rms"]
        grads, second = state["scale_grads"], state["scale_exp_avg_sq"]
        beta2 = group["betas"][1] ** period
        second.mul_(beta2).add_(grads.square().mean(dim=0), alpha=1 - beta2)
        correction = 1 - beta2 ** ((state["step"] + 1) // period)
        lr = group["lr"] * group["scalar_lr_scale"]
        step = grads.sum(dim=0) / (second.sqrt() + group["eps"])
        step.mul_(-lr * correction**0.5)
        step.masked_fill_(rms < group["param_min_rms"], 0.0)
        return torch.minimum(step, (group["param_max_rms"] - rms) / rms)

    @staticmethod
    def _step_scalars(group: dict, value: Tensor, grad: Tensor, state: dict) -> None:
        """Update a stack of one-element parameters in place, as Adam would."""
        beta1, beta2 = group["betas"]
        second, delta = state["exp_avg_sq"], state["delta"]
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta2 ** (state["step"] + 1)
        denominator = (second / correction).sqrt_().add_(group["eps"])
        lr = group["lr"] * group["scalar_lr_scale"]
        delta.mul_(beta1).addcdiv_(grad, denominator, value=-lr * (1 - beta1))
        value.clamp_(-group["scalar_max"], group["scalar_max"]).add_(delta)


def _rms(value: Tensor) -> Tensor:
    """Root mean square of every tensor of a stack, keeping dimensions."""
    return value.square().mean(tuple(range(1, value.dim())), keepdim=True).sqrt()
