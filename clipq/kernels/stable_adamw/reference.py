"""StableAdamW tensor by tensor in plain torch: what the CPU runs, and what others are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clipq.kernels.stable_adamw import Hyper, Tensors


def decays(hyper: Hyper, step: Tensor) -> tuple[float, float | Tensor, float | Tensor, float | Tensor]:
    """β1, β2, 1 - β1^t and 1 - β2^t of the step after `step`: floats, or float64 tensors where `step` is on a GPU."""
    t = step.double() + 1 if step.is_cuda else step.item() + 1
    if hyper.beta2_power is None:
        return hyper.beta1, hyper.beta2, 1 - hyper.beta1**t, 1 - hyper.beta2**t
    return hyper.beta1, 1 - t**-hyper.beta2_power, 1 - hyper.beta1**t, 1.0


def least(eps: float, dtype: torch.dtype) -> float:
    """ε², or the least that the type has: a gradient of 0 whose moment is 0 has a ratio of 0."""
    return max(eps**2, torch.finfo(dtype).tiny)


def _gradient(tensors: Tensors, i: int) -> Tensor:
    grad = tensors.grads[i].to(tensors.exp_avgs[i].dtype)
    return grad if tensors.grad_scale is None else grad / tensors.grad_scale


def ratio_sums(tensors: Tensors) -> Tensor:
    """Σ g² / max(û, ε²) of each tensor, [tensors] float32 (float64 where a tensor's moments are)."""
    sums = []
    for i, u in enumerate(tensors.exp_avg_sqs):
        hyper = tensors.hypers[tensors.groups[i]]
        _, beta2, _, correction2 = decays(hyper, tensors.steps[i])
        squares = _gradient(tensors, i).square()
        debiased = (u * beta2 + squares * (1 - beta2)) / correction2
        sums.append((squares / debiased.clamp(min=least(hyper.eps, u.dtype))).sum())
    dtype = torch.float64 if any(s.dtype is torch.float64 for s in sums) else torch.float32
    return torch.stack([s.to(dtype) for s in sums])


def rms_of(tensors: Tensors, sums: Tensor) -> Tensor:
    """RMS of each tensor; that of an empty one is 0."""
    key = (*tensors.numels, sums.dtype)
    if tensors.cache.get("key") != key:  # a copy to a GPU waits for it
        numels = [max(1, n) for n in tensors.numels]
        tensors.cache["key"] = key
        tensors.cache["numels"] = torch.tensor(numels, dtype=sums.dtype, device=sums.device)
    return (sums / tensors.cache["numels"]).sqrt()


def clipped_rates(hyper: Hyper, rms: Tensor) -> Tensor:
    """η of tensors with these RMS, of their shape."""
    excess = torch.ones_like(rms) if math.isinf(hyper.clip_threshold) else (rms / hyper.clip_threshold).clamp(min=1)
    return hyper.lr / excess


def update(tensors: Tensors, sums: Tensor) -> Tensor:
    """Changes parameters, moments and steps, given the sums of whole tensors; returns the RMS of each, [tensors]."""
    rms = rms_of(tensors, sums)
    for i, (p, m, u, step) in enumerate(
        zip(tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps, strict=True)
    ):
        hyper = tensors.hypers[tensors.groups[i]]
        beta1, beta2, correction1, correction2 = decays(hyper, step)
        grad = _gradient(tensors, i)
        m.lerp_(grad, 1 - beta1)
        u.mul_(beta2).add_(grad.square() * (1 - beta2))
        lr = clipped_rates(hyper, rms[i])
        step.add_(1)
        direction = (m / correction1) / ((u / correction2).sqrt() + hyper.eps)
        # not p · (1 - η λ): the rounding of that factor is the same at every step, and adds up
        wide = p.to(m.dtype)
        p.copy_(wide - lr * (direction + hyper.weight_decay * wide))
    return rms


def step(tensors: Tensors, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Both phases.

    Args:
        reduce: sums of the tensors here, [tensors] -> sums of the whole tensors, of which these are shards.

    Returns:
        RMS of each tensor, [tensors].
    """
    sums = ratio_sums(tensors)
    return update(tensors, sums if reduce is None else reduce(sums))
