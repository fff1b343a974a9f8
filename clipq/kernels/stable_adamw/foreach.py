"""StableAdamW with torch's operators over lists of tensors. Steps must be on the CPU."""

# pyright: reportPrivateImportUsage=false
# torch.optim is made of these operators, which torch does not export.

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from clipq.kernels.stable_adamw import Hyper, Tensors
from clipq.kernels.stable_adamw.reference import clipped_rates, decays, least, rms_of


def _batches(tensors: Tensors) -> list[tuple[Hyper, list[int]]]:
    """Indices of tensors that share group, step and type: what one call over a list may take together."""

    def key(i: int) -> tuple[Any, ...]:
        return tensors.groups[i], tensors.steps[i].item(), str(tensors.params[i].dtype), str(tensors.exp_avgs[i].dtype)

    indices = sorted(range(len(tensors.params)), key=key)
    return [(tensors.hypers[group], list(same)) for (group, *_), same in groupby(indices, key)]


def _gradients(tensors: Tensors, indices: list[int]) -> list[Tensor]:
    grads = [tensors.grads[i].to(tensors.exp_avgs[i].dtype) for i in indices]
    return grads if tensors.grad_scale is None else list(torch._foreach_div(grads, tensors.grad_scale))


def ratio_sums(tensors: Tensors) -> Tensor:
    """As in `reference`."""
    sums: list[Any] = [None] * len(tensors.params)
    for hyper, indices in _batches(tensors):
        _, beta2, _, correction2 = decays(hyper, tensors.steps[indices[0]])
        squares = _gradients(tensors, indices)
        squares = list(torch._foreach_mul(squares, squares))
        debiased = list(torch._foreach_lerp([tensors.exp_avg_sqs[i] for i in indices], squares, 1 - cast(float, beta2)))
        torch._foreach_div_(debiased, cast(float, correction2))
        torch._foreach_clamp_min_(debiased, least(hyper.eps, debiased[0].dtype))
        torch._foreach_div_(squares, debiased)
        # no term is negative: the sum of magnitudes is the sum
        for i, total in zip(indices, torch._foreach_norm(squares, 1), strict=True):
            sums[i] = total
    dtype = torch.float64 if any(s.dtype is torch.float64 for s in sums) else torch.float32
    return torch.stack([s.to(dtype) for s in sums])


def update(tensors: Tensors, sums: Tensor) -> Tensor:
    """As in `reference`."""
    rms = rms_of(tensors, sums)
    each = rms.unbind()
    for hyper, indices in _batches(tensors):
        params, m, u = (
            [values[i] for i in indices] for values in (tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs)
        )
        beta1, beta2, correction1, correction2 = decays(hyper, tensors.steps[indices[0]])
        grads = _gradients(tensors, indices)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(u, beta2)
        torch._foreach_addcmul_(u, grads, grads, 1 - cast(float, beta2))
        directions = list(torch._foreach_div(u, cast(float, correction2)))
        torch._foreach_sqrt_(directions)
        torch._foreach_add_(directions, hyper.eps)
        torch._foreach_reciprocal_(directions)
        torch._foreach_mul_(directions, m)
        torch._foreach_div_(directions, cast(float, correction1))
        wide = params if params[0].dtype is m[0].dtype else [p.to(m[0].dtype) for p in params]
        if hyper.weight_decay:
            torch._foreach_add_(directions, wide, alpha=hyper.weight_decay)
        own_rms = torch.stack([each[i] for i in indices])  # rms[indices] would copy the indices to the GPU, and wait
        torch._foreach_mul_(directions, list(clipped_rates(hyper, own_rms).to(m[0].dtype).unbind()))
        torch._foreach_sub_(wide, directions)
        if wide is not params:
            torch._foreach_copy_(params, wide)
        torch._foreach_add_([tensors.steps[i] for i in indices], 1)
    return rms


def step(tensors: Tensors, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """As in `reference`."""
    sums = ratio_sums(tensors)
    return update(tensors, sums if reduce is None else reduce(sums))
