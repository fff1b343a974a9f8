"""Collectives over tensors: two with a gradient, one for results of unequal length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank's loss depends on every rank's features, so the gradient of a rank's own part is the sum of
        # what all ranks computed for it.
        (grad,) = grads
        grad = grad.contiguous()
        if dist.get_backend() == "nccl":
            out = torch.empty_like(grad[0])
            dist.reduce_scatter_tensor(out, grad)
            return out
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """`x` of every rank, stacked by rank: [...] -> [world_size, ...]. The backward sums the gradients over ranks.

    Shapes and dtypes must be equal on all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x.unsqueeze(0)
    return _AllGather.apply(x)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Exchange.forward(ctx, *grads)  # what came from a rank goes back to it


def exchange_with_grad(x: Tensor) -> Tensor:
    """Part r of rank q's `x` becomes part q of rank r's: [world_size, ...] -> [world_size, ...]; so do gradients.

    Shapes and dtypes must be equal on all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Exchange.apply(x)  # pyright: ignore[reportReturnType]


def gather_rows(x: Tensor) -> Tensor:
    """The rows of every rank, one after another: [n_r, ...] -> [sum of n_r, ...], for any n_r, zero included.

    Every rank must call it; every rank gets the result.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    count = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c.item()) for c in counts]
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """A picklable `value` of every rank, by rank. Every rank must call it; every rank gets the list."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def raised_on_every_rank(kind: type[Exception]) -> Iterator[None]:
    """An error of this kind within, on any rank, is raised on all of them: one alone would leave the others waiting.

    Collective: every rank must enter it; `kind` is made from a message, which names the rank where it is not the first.
    """
    fault: Exception | None = None
    try:
        yield
    except kind as error:
        fault = error
    messages = gather_objects(None if fault is None else str(fault))
    rank = next((r for r, message in enumerate(messages) if message is not None), None)
    if rank is not None:
        raise kind(f"rank {rank}: {messages[rank]}" if rank else messages[rank]) from fault
