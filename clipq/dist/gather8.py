"""Matrices that FSDP2 gathers in 8 bits: each rank quantizes its shard with the scale of the whole matrix.

Where they arrive they are widened to the parameter's own type, so that whatever reads the parameter finds numbers. A
layer that quantizes them again, to the same type with one scale, finds the very same 8 bits: the largest magnitude is a
value of that type, and the others are too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh

from clipq.kernels.formats import QMAX, TINY


class _Matrix:
    """The two extensions that FSDP2 looks for on a shard."""

    def __init__(self, shard: Tensor, amax: Tensor, dtype: torch.dtype) -> None:
        self._shard, self._amax, self._dtype = shard, amax, dtype

    def pack(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], int]:
        """This rank's rows in 8 bits, with the rows that FSDP2 pads them to; and how many all ranks have together."""
        inverse = torch.where(self._amax > TINY, QMAX[self._dtype] / self._amax, 0.0)
        v = self._shard * inverse
        v = v.round_() if self._dtype is torch.int8 else v.clamp_(-QMAX[self._dtype], QMAX[self._dtype])
        q = v.to(self._dtype).view(torch.uint8)
        padding = -(-outer_size[0] // mesh.size()) - q.shape[0]
        return (torch.cat((q, q.new_zeros(padding, q.shape[1]))) if padding else q,), outer_size[0]

    @torch.no_grad()
    def unpack(
        self, gathered: tuple[Tensor], rows: int, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """Widens the gathered matrix, into `out` from the second time on."""
        q = gathered[0][:rows].view(self._dtype)
        q = q if self._dtype is torch.int8 else q.float()  # torch multiplies no fp8
        scale = self._amax / QMAX[self._dtype]
        if out is None:
            whole = (q * scale).to(param_dtype)
            return whole, (whole,)
        with _unsafe_preserve_version_counter(out):  # autograd may have kept it: the values are the same
            torch.mul(q, scale, out=out)
        return None


class EightBitGathers:
    """Gathers sharded matrices in 8 bits.

    Args:
        matrices: float32 parameters [m, n] that FSDP2 has sharded by rows and not gathered yet, and the type of each:
            int8 or an fp8.
    """

    def __init__(self, matrices: Mapping[Any, torch.dtype]) -> None:
        self.matrices = list(matrices)
        self._shards: list[Tensor] = [p._local_tensor for p in matrices]
        device = self._shards[0].device if self._shards else None
        self._amax = torch.full((len(matrices),), torch.nan, device=device)  # numbers that nobody takes for weights
        for shard, amax, dtype in zip(self._shards, self._amax, matrices.values(), strict=True):
            matrix: Any = _Matrix(shard, amax, dtype)
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = matrix.pack, matrix.unpack  # pyright: ignore

    @torch.no_grad()
    def scale(self) -> None:
        """Takes the largest magnitudes, of all matrices at once: to be called when weights have changed. Collective."""
        if not self._shards:
            return
        norms = torch._foreach_norm(self._shards, torch.inf)  # pyright: ignore[reportPrivateImportUsage]
        largest = torch.stack(norms)
        # a maximum over ranks may leave NaN out, infinity it does not: either way nothing of the matrix stays finite
        self._amax.copy_(largest.nan_to_num(nan=torch.inf, posinf=torch.inf))
        dist.all_reduce(self._amax, dist.ReduceOp.MAX)
