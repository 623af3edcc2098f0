"""ScaledAdam: Adam whose steps are relative to each parameter's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from espnet2_spear.torch_private import foreach_copy_, foreach_norm

# Those of the reference, which no published training changes.
SCALAR_LR = 0.1  # learning rate of scales and one-element parameters, relative to lr
SCALAR_MAX = 10.0  # a one-element parameter is held within this before its update
MIN_RMS = 1.0e-5  # smaller tensors are treated as this large, and not scaled down
MAX_RMS = 3.0  # to which the scale step may raise a tensor
SCALE_PERIOD = 4  # steps between two updates of the scales
_NORM_PERIOD = 100  # steps between two updates of the clipping threshold
_BLOCK = 1 << 19  # elements that a CPU updates at once: all operands stay in its cache
_SCALAR_STATE = ("delta", "exp_avg_sq")
_STATE = (*_SCALAR_STATE, "param_rms", "min_rms", "scale_exp_avg_sq", "scale_grads")


@dataclass
class _Stack:
    """Parameters of one shape that are updated as one tensor.

    Row i of every tensor in ``state`` is the state of ``params[i]``; the optimizer's
    own state of that parameter holds views of these rows, so that a checkpoint does
    not depend on which parameters were stacked.
    """

    group: dict[str, Any]
    params: list[Tensor]
    step: int
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_scalar(self) -> bool:
        """Whether every parameter has one element."""
        return self.params[0].numel() == 1

    def pieces(
        self, grads: list[Tensor]
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Yield what is to be updated together, as 2-dimensional tensors.

        Returns:
            rows of the stack; their values, gradients, deltas and second moments.
            Values, deltas and second moments are to be changed in place.
        """
        state = [self.state[n].flatten(1) for n in ("delta", "exp_avg_sq")]
        size = self.params[0].numel()
        blocks = self.params[0].device.type == "cpu" and size > _BLOCK // 4
        if not blocks or not all(p.is_contiguous() for p in self.params):
            value = torch.stack(self.params)
            yield slice(None), value.flatten(1), torch.stack(grads).flatten(1), *state
            foreach_copy_(self.params, list(value.unbind()))
            return
        for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            whole = [p.view(1, -1), grad.reshape(1, -1)]
            whole += [s[i : i + 1] for s in state]
            for start in range(0, size, _BLOCK):
                part = slice(start, start + _BLOCK)
                yield slice(i, i + 1), *(x[:, part] for x in whole)


class ScaledAdam(torch.optim.Optimizer):
    """Optimizer of the Zipformer paper (arXiv 2310.11230, section 3.5).

    Differences from Adam: the step of a tensor is multiplied by its root mean
    square; a second, explicit step learns its scale, from the gradient of the
    logarithm of the scale; momentum is kept on the update; the gradients of each group
    of parameters are clipped relative to the median of their last 100 norms. A constant
    factor on the loss changes nothing. Switch other gradient clipping off (ESPnet:
    ``grad_clip: 1.0e+9``).

    Parameters of equal shape are updated together as one stacked tensor; on a CPU,
    where memory is what limits it, large ones in place and block by block. Nothing is
    read back from a GPU, clipping included. Parameters may be frozen and unfrozen
    between steps.

    A tensor that starts as zeros has no size that steps could be relative to: from
    ``MIN_RMS`` it would need thousands of steps at the rates of fine-tuning (a
    factor of e every 1 / lr steps). LoRA's B, the projection of ``logmel: project`` and
    biases begin so. Such a tensor is treated as one of RMS ``zero_rms`` until it is
    larger, as LAMB (arXiv 1904.00962) bounds the norm that it multiplies steps by.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups.
        lr: learning rate; 0.045 is usual, with the schedule Eden.
        clipping_scale: gradients are clipped to this multiple of the median
            norm; None switches clipping off.
        betas: decay of the update's momentum and of the second moment.
        eps: added to denominators.
        zero_rms: least size of tensors that are all zeros before their first step;
            the reference has the ``MIN_RMS`` of all there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.045,
        clipping_scale: float | None = 2.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1.0e-8,
        zero_rms: float = 0.1,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr {lr} must not be negative")
        if clipping_scale is not None and clipping_scale <= 0:
            raise ValueError(f"clipping_scale {clipping_scale} must be positive")
        defaults = dict(
            lr=lr,
            clipping_scale=clipping_scale,
            betas=tuple(betas),
            eps=eps,
            zero_rms=zero_rms,
        )
        self._stacks: list[_Stack] | None = None
        self._trainable: list[bool] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see torch.optim.Optimizer.

        Parameters that ask for another learning rate (:func:`scale_lr`) form groups of
        their own.
        """
        lr = param_group.get("lr", self.defaults["lr"])
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params
        for scale, chosen in split_by_lr_scale(params).items():
            group = {**param_group, "params": chosen, "lr": lr * scale}
            super().add_param_group(group)
        self._stacks = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a checkpoint or a copy."""
        super().__setstate__(state)
        self._stacks = None

    def _stack_parameters(self) -> list[_Stack]:
        """Trainable parameters by group, type, shape and steps done."""
        trainable = [p.requires_grad for g in self.param_groups for p in g["params"]]
        if self._stacks is not None and trainable == self._trainable:
            return self._stacks
        self._stacks, self._trainable = [], trainable
        for group in self.param_groups:
            by_kind: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.requires_grad:
                    step = self.state[p].get("step", 0) if p in self.state else 0
                    key = (p.dtype, p.device, p.shape, step)
                    by_kind.setdefault(key, []).append(p)
            for (*_, step), params in by_kind.items():
                stack = _Stack(group, params, step)
                if step:
                    rows = [self.state[p] for p in params]
                    names = _STATE if params[0].numel() > 1 else _SCALAR_STATE
                    stack.state = {n: torch.stack([r[n] for r in rows]) for n in names}
                    self._share(stack)
                self._stacks.append(stack)
        return self._stacks

    def _share(self, stack: _Stack) -> None:
        """Make the states of single parameters views of the stack's."""
        for name, rows in stack.state.items():
            for p, row in zip(stack.params, rows.unbind(), strict=True):
                self.state[p][name] = row

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Do one step; a parameter without a gradient counts as gradient 0."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for stack in self._stack_parameters():
            if all(p.grad is None for p in stack.params):
                continue
            grads = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in stack.params
            ]
            if any(g.is_sparse for g in grads):
                raise RuntimeError("ScaledAdam does not support sparse gradients")
            if not stack.state:
                self._init_state(stack)
            work.append((stack, grads))
        for group in self.param_groups:
            own = [item for item in work if item[0].group is group]
            clip = self._clipping_factor(group, own)
            for stack, grads in own:
                update = self._step_scalars if stack.is_scalar else self._step_tensors
                update(stack, grads, clip)
                stack.step += 1
                for p in stack.params:
                    self.state[p]["step"] = stack.step
        return loss

    def _init_state(self, stack: _Stack) -> None:
        state, value = stack.state, torch.stack(stack.params)
        state["delta"] = torch.zeros_like(value)
        state["exp_avg_sq"] = torch.zeros_like(value)
        if not stack.is_scalar:
            state["param_rms"] = rms = _rms(stack.params)
            zeros = stack.group["zero_rms"]
            least = torch.full_like(rms, MIN_RMS).masked_fill_(rms == 0, zeros)
            state["min_rms"] = least
            state["scale_exp_avg_sq"] = torch.zeros_like(state["param_rms"])
            state["scale_grads"] = value.new_zeros(len(value), SCALE_PERIOD)
        self._share(stack)

    def _clipping_factor(
        self, group: dict[str, Any], work: list[tuple[_Stack, list[Tensor]]]
    ) -> Tensor | None:
        """Return min(1, threshold / norm) of a group; None: there is no threshold yet.

        The norm is of gradients times the sizes of their parameters, so that it
        measures the effect of a unit relative step. Each group has a threshold of its
        own, as in the reference: the encoder of a fine-tuning and its new head differ
        much in their norms. Everything stays on the device: no synchronisation. The
        norms are kept with the group's first parameter, whether or not it has a
        gradient itself.
        """
        scale = group["clipping_scale"]
        if not work or scale is None:
            return None
        owner = group["params"][0]
        history = self.state[owner]
        total = torch.zeros((), device=owner.device)
        for stack, grads in work:
            norms = torch.stack(foreach_norm(grads)).float()
            if not stack.is_scalar:
                norms *= stack.state["param_rms"]
            total += norms.square().sum().to(owner.device)
        norm = total.sqrt()
        step = history.get("num_norms", 0)
        if step == 0:
            history["model_norms"] = torch.zeros(_NORM_PERIOD, device=owner.device)
        history["num_norms"] = step + 1
        history["model_norms"][step % _NORM_PERIOD] = norm
        # There is no median yet; the reference does not clip either.
        if step < _NORM_PERIOD:
            return None
        if step % _NORM_PERIOD == 0:
            median = history["model_norms"].sort()[0][_NORM_PERIOD // 2]
            history["model_norm_threshold"] = scale * median
        return (history["model_norm_threshold"] / (norm + 1e-20)).clamp(max=1.0)

    @staticmethod
    def _step_tensors(stack: _Stack, grads: list[Tensor], clip: Tensor | None) -> None:
        """Update a stack of tensors in place: relative step and scale step."""
        group, state, step = stack.group, stack.state, stack.step
        beta1, beta2 = group["betas"]
        rms = state["param_rms"]
        # <theta, g> is the gradient of log(scale): d f(e^c theta) / d c at c = 0.
        products = _dots(stack.params, grads)
        state["scale_grads"][:, step % SCALE_PERIOD] = (
            products if clip is None else products * clip.to(products)
        )
        scale_step = None
        if step % SCALE_PERIOD == SCALE_PERIOD - 1:
            rms.copy_(_rms(stack.params))
            scale_step = (1 - beta1) * ScaledAdam._scale_step(stack)[:, None]
        correction = 1 - beta2 ** (step + 1)
        if correction >= 0.99:  # as the reference, which stops correcting here
            correction = 1.0
        size = torch.maximum(rms, state["min_rms"]) * (-group["lr"] * (1 - beta1))
        size = size[:, None]
        for rows, value, grad, delta, second in stack.pieces(grads):
            if clip is not None:
                grad = grad * clip.to(grad)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = second.sqrt()
            if correction < 1.0:
                denominator.mul_(correction**-0.5)
            denominator.add_(group["eps"])
            # Momentum is kept on the update, so the scale step is smoothed by it, too.
            delta.mul_(beta1)
            if scale_step is not None:
                delta.addcmul_(value, scale_step[rows])
            delta.add_(torch.div(grad, denominator, out=denominator).mul_(size[rows]))
            value.add_(delta)

    @staticmethod
    def _scale_step(stack: _Stack) -> Tensor:
        """Relative changes of the scales, from the gradients of the last steps."""
        group, state = stack.group, stack.state
        rms = state["param_rms"]
        grads, second = state["scale_grads"], state["scale_exp_avg_sq"]
        beta2 = group["betas"][1] ** SCALE_PERIOD
        second.mul_(beta2).add_(grads.square().mean(dim=1), alpha=1 - beta2)
        correction = 1 - beta2 ** ((stack.step + 1) // SCALE_PERIOD)
        lr = group["lr"] * SCALAR_LR
        step = grads.sum(dim=1) / (second.sqrt() + group["eps"])
        step.mul_(-lr * correction**0.5)
        step.masked_fill_(rms < state["min_rms"], 0.0)
        return torch.minimum(step, (MAX_RMS - rms) / rms)

    @staticmethod
    def _step_scalars(stack: _Stack, grads: list[Tensor], clip: Tensor | None) -> None:
        """Update a stack of one-element parameters in place, as Adam would."""
        group, state = stack.group, stack.state
        beta1, beta2 = group["betas"]
        value, grad = torch.stack(stack.params), torch.stack(grads)
        if clip is not None:
            grad = grad * clip.to(grad)
        second, delta = state["exp_avg_sq"], state["delta"]
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta2 ** (stack.step + 1)
        denominator = (second / correction).sqrt_().add_(group["eps"])
        lr = group["lr"] * SCALAR_LR
        delta.mul_(beta1).addcdiv_(grad, denominator, value=-lr * (1 - beta1))
        value.clamp_(-SCALAR_MAX, SCALAR_MAX).add_(delta)
        foreach_copy_(stack.params, list(value.unbind()))


def _rms(tensors: list[Tensor]) -> Tensor:
    """Root mean squares (S,) of S tensors of one shape."""
    norms = torch.stack(foreach_norm(tensors))
    return norms * tensors[0].numel() ** -0.5


def _dots(tensors: list[Tensor], others: list[Tensor]) -> Tensor:
    """Sums (S,) of the products of S pairs of tensors of one shape."""
    if tensors[0].device.type == "cpu":  # reads either once and writes nothing
        pairs = zip(tensors, others, strict=True)
        return torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in pairs])
    return (torch.stack(tensors) * torch.stack(others)).flatten(1).sum(dim=1)


# --- Learning rates of parts of a model, relative to the others' ----------------------
# ESPnet hands an optimizer bare parameters, without names or groups. So a module that
# is to learn at another rate says so on its parameters, and ScaledAdam listens.

_SCALE = "lr_scale"
_HEARD = "lr_scale_heard"


def scale_lr(module: nn.Module, scale: float) -> None:
    """Ask for ``scale`` times the learning rate for all parameters of a module.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(
            f"lr_scale {scale} must be positive (freeze: to learn nothing)"
        )
    for parameter in module.parameters():
        setattr(parameter, _SCALE, scale)


def split_by_lr_scale(params: Iterable[Any]) -> dict[float, list[Any]]:
    """Sort parameters, or pairs of name and parameter, by the scale they ask for."""
    groups: dict[float, list[Any]] = {}
    for item in params:
        parameter: Tensor = item[1] if isinstance(item, tuple) else item
        scale = getattr(parameter, _SCALE, 1.0)
        if scale != 1.0:
            setattr(parameter, _HEARD, True)
        groups.setdefault(scale, []).append(item)
    return groups


def check_lr_scale(module: nn.Module, what: str) -> None:
    """Refuse to train where no optimizer listened.

    Raises:
        ValueError: a parameter asks for another rate and its optimizer ignores it.
    """
    parameter = next(module.parameters())
    if getattr(parameter, _SCALE, 1.0) != 1.0 and not hasattr(parameter, _HEARD):
        raise ValueError(
            f"{what}: lr_scale is for `optim: scaledadam`; the optimizer of this run "
            "ignores it: change `optim`, or take lr_scale out"
        )
