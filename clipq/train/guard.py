"""Keeps a run alive: steps that would spoil the weights are seen on the device, and their updates are never made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from clipq.config.choices import GuardPolicy
from clipq.optim.loss_scale import FixedLossScaler
from clipq.optim.shards import local_grad, norms

Scaler = torch.amp.GradScaler | FixedLossScaler


def gradient_norms(params: Sequence[nn.Parameter]) -> Tensor:
    """2-norm of each parameter's gradient, [params] float32, over all its shards; 0 where there is none."""
    return norms(params, [None if p.grad is None else local_grad(p) for p in params])


def total_norm(norms: Tensor) -> Tensor:
    """2-norm of all gradients, [] float32: of squares that float32 may not hold."""
    return torch.linalg.vector_norm(norms, dtype=torch.float64).float()


@torch.no_grad()
def clip_gradients(params: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scales all gradients so that their norm, which is known, is at most the limit.

    As `torch.nn.utils.clip_grads_with_norm_`, which does not take sharded gradients and others together.
    """
    grads = [local_grad(p) for p in params if p.grad is not None]
    if grads:  # a fixed loss scale may have put all of them aside
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]


class Statistics:
    """Running statistics of batch norms, which a forward changes: of a step that is refused they are not to stay."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [b for m in norms for b in m.buffers(recurse=False)]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Takes a copy of them as they are."""
        self._before = [b.clone() for b in self.buffers]

    @torch.no_grad()
    def put_back(self, bad: Tensor | bool = True) -> None:
        """Puts the copy back; given a bool [] on the device, where it is true, without waiting."""
        for buffer, before in zip(self.buffers, self._before, strict=True):
            buffer.copy_(before if bad is True else torch.where(torch.as_tensor(bad), before, buffer))
        self._before = []


class Guard:
    """Judges each step before its update.

    Nothing waits for the device: the optimizer's kernels are told not to write, and the loop learns of it when it reads
    the losses.

    Args:
        names: of the parameters, in the order of their gradients' norms.
        policy: what the loop does about a bad step.
        rise: how far above its running mean a loss may lie, or None.
        limit: bad steps, or rewinds, that end the run.
        scaling: a loss scaler decides about the gradients.
    """

    def __init__(
        self, names: Sequence[str], *, policy: GuardPolicy, rise: float | None, limit: int, scaling: bool
    ) -> None:
        self.names, self.policy, self.limit = list(names), policy, limit
        self._rise, self._scaling = rise, scaling
        self.bound = math.inf
        self.stepped_in = 0
        """Bad steps skipped, or rewinds, so far."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step is bad, a bool [] on the device.

        Args:
            loss: [], the mean over all ranks, so that all of them decide alike.
            norm: [], 2-norm of all gradients.
        """
        bad = ~loss.isfinite() | (loss > self.bound)
        return bad if self._scaling else bad | ~norm.isfinite()

    def update(self, optimizer: Optimizer, scaler: Scaler, bad: Tensor) -> None:
        """The optimizer's step, which changes nothing where the step is bad. A loss scaler judges gradients itself."""
        if self._scaling:  # the scaler has a `found_inf` of its own to tell the optimizer
            if not bad.item():
                scaler.step(optimizer)
            elif isinstance(scaler, FixedLossScaler):
                scaler.forgive()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            # what torch.amp.GradScaler tells an optimizer whose kernels can leave a step out
            optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        elif not bad.item():
            optimizer.step()

    def learn(self, mean: float | None) -> None:
        """Takes the running mean of the loss that the next losses are held against; None where there is none yet."""
        self.bound = math.inf if self._rise is None or mean is None else mean + self._rise

    def reason(self, loss: float, norms: Tensor) -> tuple[str, str | None]:
        """What was bad about a step, and the first parameter whose gradient went bad, where the loss was not.

        Gradients flow from the end of the model to its start, and so does a NaN: the first is the last by position.

        Args:
            norms: [params] of this step, as of `gradient_norms`.
        """
        bad = [name for name, finite in zip(self.names, norms.isfinite().tolist(), strict=True) if not finite]
        if not math.isfinite(loss):
            return f"the loss is {loss}", None
        if loss > self.bound:
            return f"the loss is {loss:.3f}, above the bound of {self.bound:.3f}", bad[-1] if bad else None
        return f"gradients of {len(bad)} of {len(self.names)} parameters are not finite", bad[-1] if bad else None
