"""Tensors that are shards of a whole over processes (DTensor, as FSDP2 has them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLAIN = {Tensor, nn.Parameter}


def _sharded(t: Tensor) -> Any:
    """The tensor as a DTensor, or None."""
    if type(t) in PLAIN or not dist.is_available():  # asked several times for each parameter of a step
        return None
    from torch.distributed.tensor import DTensor

    return t if isinstance(t, DTensor) else None


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    whole = _sharded(t)
    return t if whole is None else whole.to_local()


def all_local(tensors: list[Tensor]) -> list[Tensor]:
    """`local` of each; the list itself where none is sharded."""
    return tensors if PLAIN.issuperset(map(type, tensors)) else [local(t) for t in tensors]


def local_grad(p: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient, laid out as the parameter is.

    Collective where the gradient is laid out otherwise: without FSDP, tensor parallelism leaves sums unfinished.
    """
    own, grad = _sharded(p), _sharded(p.grad)  # pyright: ignore[reportArgumentType]
    if own is not None and grad is not None and own.placements != grad.placements:
        return grad.redistribute(placements=own.placements).to_local()
    return local(p.grad)  # pyright: ignore[reportArgumentType]


def whole(t: Tensor) -> Tensor:
    """All of a tensor, on its device; itself where it is not sharded. Collective where it is."""
    sharded = _sharded(t)
    return t if sharded is None else sharded.full_tensor()


def laid_out_as(like: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every process has whole, sharded as another one is; itself where that is not sharded."""
    sharded = _sharded(like)
    if sharded is None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = sharded.device_mesh, sharded.placements
    part = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)  # nothing is sent
    return torch.empty_like(sharded, dtype=whole.dtype).copy_(part)  # the part may be a view of the whole


def reducer(params: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """Adds numbers of shards, [params], over the processes that hold the others; None where nothing is sharded.

    One all-reduce for each dimension of a mesh along which tensors are sharded: one under FSDP2, two with tensor
    parallelism besides. To be called on every rank with the same parameters.

    Raises:
        RuntimeError: a tensor is a partial sum.
    """
    if PLAIN.issuperset(map(type, params)):
        return None
    wanted: dict[tuple[Any, int], list[int]] = {}
    for i, p in enumerate(params):
        whole = _sharded(p)
        if whole is None:
            continue
        for dim, placement in enumerate(whole.placements):
            if placement.is_partial():
                raise RuntimeError(f"a parameter is a partial sum over {whole.device_mesh}: expected shards or copies")
            if not placement.is_replicate():  # of strided shards, FSDP over tensor parallelism, is_shard() is False
                wanted.setdefault((whole.device_mesh, dim), []).append(i)
    if not wanted:
        return None

    def reduce(sums: Tensor) -> Tensor:
        for (mesh, dim), indices in wanted.items():
            if len(indices) == len(params):
                dist.all_reduce(sums, group=mesh.get_group(dim))
                continue
            each = list(sums.unbind())  # indexing by a list would copy it to the GPU, and wait
            part = torch.stack([each[i] for i in indices])
            dist.all_reduce(part, group=mesh.get_group(dim))
            for i, value in zip(indices, part.unbind(), strict=True):
                each[i] = value
            sums = torch.stack(each)
        return sums

    return reduce


def norms(params: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
    """2-norm of each tensor, [params] float32, over all its shards; 0 where there is none.

    Args:
        params: to which the tensors belong, and as which they are sharded; the same on every rank.
        tensors: what this process holds of each.
    """
    have = [(i, t) for i, t in enumerate(tensors) if t is not None]
    if not have:
        return torch.zeros(len(params), device=local(params[0]).device)
    found = torch._foreach_norm([t for _, t in have])  # pyright: ignore[reportPrivateImportUsage]
    if len(have) < len(params):
        zero = found[0].new_zeros(())
        known = dict(zip((i for i, _ in have), found, strict=True))
        found = [known.get(i, zero) for i in range(len(params))]
    own, reduce = torch.stack([n.float() for n in found]), reducer([*params])
    # squares of float32 overflow from 2e19 on
    return own if reduce is None else reduce(own.double().square()).sqrt().float()
