"""A copy of what a checkpoint holds, as it is now, in memory that training does not touch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipq.optim.shards import whole


class Snapshot:
    """Copies tensors to the CPU, into buffers that are kept for the next time.

    Buffers of what lies on a GPU are pinned: the GPU then writes them itself, all of them with one wait. Pinning
    memory takes longer than filling it, so it is done once.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Size of the tensors in the last copy."""
        return sum(b.nbytes for b in self._buffers[: self._used])

    def take(self, tree: Any, *, keep: bool) -> Any:
        """Mappings and sequences of tensors and plain values, copied; sharded tensors whole. Collective if any are.

        One is gathered after another, so that a device holds no more than one of them whole. The copy before is
        overwritten.

        Args:
            keep: whether this rank wants the copy; without, its tensors are None.
        """
        self._used = 0
        found = self._copied(tree, keep)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return found

    def _copied(self, tree: Any, keep: bool) -> Any:
        if isinstance(tree, Tensor):
            tensor = whole(tree.detach())
            return self._copy(tensor) if keep else None
        if isinstance(tree, Mapping):
            return {key: self._copied(value, keep) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)([self._copied(value, keep) for value in tree])
        return tree

    def _copy(self, tensor: Tensor) -> Tensor:
        """Tensors come in the same order every time, so the buffer is known by its number."""
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[self._used]
        if (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[self._used] = buffer
        self._used += 1
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
