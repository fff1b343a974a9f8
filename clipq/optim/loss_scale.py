"""Loss scaling for fp16 by a fixed number, with overflow handled tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipq.optim.shards import local, local_grad, reducer


class FixedLossScaler:
    """Multiplies the loss by a fixed scale; a parameter whose gradient is not finite is left out of the step.

    torch's dynamic scaler leaves out the whole step, and lowers the scale for all tensors, when one of them overflows.
    In large CLIP models the first to overflow are few, the patch embedding above all. Source: Wortsman et al.,
    https://arxiv.org/abs/2304.13013, who advise a fixed scale of 65536.

    It has the methods of `torch.amp.GradScaler` that a training loop calls. Each step waits for the device once, to
    learn which gradients are finite. Under FSDP2 all ranks decide alike.

    Args:
        named_parameters: as of `model.named_parameters()`: what the counts are kept by.
        scale: a positive number; of powers of two the unscaled gradients are exact.

    Attributes:
        skipped: how often each parameter was left out, by name.
        left_out: names of the parameters that the last step left out.
        in_a_row: how many steps in a row, the last among them, left each of these out.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], scale: float = 65536.0) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"FixedLossScaler: scale={scale}: expected a positive, finite number")
        named = list(named_parameters)
        if any(isinstance(entry, Tensor) for entry in named):
            raise TypeError("FixedLossScaler: expected names and parameters, as of model.named_parameters()")
        self._names = {p: name for name, p in named}
        self._scale = scale
        self._removed: dict[int, dict[nn.Parameter, Tensor]] = {}
        """Gradients put aside, for each optimizer that was unscaled since the last `update`."""
        self._stepped: set[int] = set()
        self._before: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.left_out: list[str] = []
        self.in_a_row: dict[str, int] = {}

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale, in float32 at least.

        Raises:
            ValueError: a loss in float16, whose gradient, which is the scale, float16 does not hold.
        """
        if loss.dtype is torch.float16 and self._scale > torch.finfo(torch.float16).max:
            raise ValueError(
                f"a loss in float16, whose gradient would be the scale of {self._scale:g}, infinite there: compute the "
                "loss in float32"
            )
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self._scale

    def get_scale(self) -> float:
        return self._scale

    def is_enabled(self) -> bool:
        return True

    @torch.no_grad()
    def unscale_(self, optimizer: Optimizer) -> None:
        """Divides the optimizer's gradients by the scale, and puts those aside that are not finite, until after `step`.

        Raises:
            RuntimeError: called twice in a step.
            ValueError: gradients in float16, which unscaled ones do not fit into.
        """
        if id(optimizer) in self._removed:
            raise RuntimeError("unscale_() was called already on this optimizer since the last update()")
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad is not None and p.grad.dtype is torch.float16 for p in params):
            raise ValueError(
                "gradients in float16 cannot be unscaled: keep float32 weights, and compute under autocast"
            )
        finite = _finite(params)
        removed = {p: p.grad for p, good in zip(params, finite, strict=True) if not good and p.grad is not None}
        for p in removed:
            p.grad = None
        if not self._removed:  # the first since the last update
            self.left_out = []
        self._removed[id(optimizer)] = removed
        names = [self._names.setdefault(p, f"parameter {len(self._names)}, which has no name") for p in removed]
        self.left_out = self.left_out + names
        self.skipped.update(names)
        self.in_a_row = {name: self._before.get(name, 0) + 1 for name in self.left_out}
        kept = [local(p.grad) for p in params if p.grad is not None]
        if kept:
            torch._foreach_mul_(kept, 1 / self._scale)  # pyright: ignore[reportPrivateImportUsage]

    def step(self, optimizer: Optimizer) -> Any:
        """The optimizer's step without the parameters whose gradients are not finite.

        Raises:
            RuntimeError: called twice without `update`.
        """
        if id(optimizer) in self._stepped:
            raise RuntimeError("step() was called already on this optimizer since the last update()")
        if id(optimizer) not in self._removed:
            self.unscale_(optimizer)
        self._stepped.add(id(optimizer))
        result = optimizer.step()
        self._put_back(self._removed[id(optimizer)])
        return result

    def forgive(self) -> None:
        """Takes back what was counted in this step, whose gradients say nothing: its loss was bad itself."""
        self.skipped.subtract(self.left_out)
        self.skipped += Counter()  # without those that are 0
        self.left_out, self.in_a_row = [], self._before

    def update(self) -> None:
        """Ends a step."""
        for removed in self._removed.values():
            self._put_back(removed)
        self._removed.clear()
        self._stepped.clear()
        self._before = self.in_a_row

    @staticmethod
    def _put_back(removed: dict[nn.Parameter, Tensor]) -> None:
        """Gradients that were put aside come back, as they were: a recorded backward writes into them."""
        for p, grad in removed.items():
            p.grad = grad
        removed.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the counts over; the scale stays as it was given. The state of a dynamic scaler has none."""
        self.skipped = Counter(state.get("skipped", {}))


def _finite(params: list[nn.Parameter]) -> list[bool]:
    """Whether all of each parameter's gradient, over all its shards, is finite."""
    if not params:
        return []
    grads = [local_grad(p) for p in params]
    filled = [i for i, g in enumerate(grads) if g.numel()]
    bad = torch.zeros(len(params), device=grads[0].device)
    if filled:
        largest = torch._foreach_norm([grads[i] for i in filled], math.inf)  # pyright: ignore[reportPrivateImportUsage]
        bad[filled] = (~torch.stack([n.float() for n in largest]).isfinite()).float()
    reduce = reducer(list(params))
    return [count == 0 for count in (bad if reduce is None else reduce(bad)).tolist()]
