"""A matrix of logits in tiles: what keeps the memory of a loss linear in the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from clipq.dist.gather import all_gather_with_grad

TILE = 2**24
"""Logits computed at a time, 64 MiB of fp32: products of matrices are as fast as on whole ones, and up to 4096 pairs on
one rank there is a single tile."""


def operands(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, int]:
    """The factors of the logits in fp32 (fp64 where features are), and the first column of this rank. Collective.

    Returns:
        Scaled features of this rank's images [B, D], those of all ranks' texts [W, B, D], column of row 0's own text.
    """
    dtype = torch.promote_types(image_BD.dtype, torch.float32)
    text_WBD = all_gather_with_grad(text_BD.to(dtype))
    W, B, _ = text_WBD.shape
    return scale.to(dtype) * image_BD.to(dtype), text_WBD, dist.get_rank() * B if W > 1 else 0


def tiles(rows: int, columns: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Covers a matrix with at least as many columns as rows by tiles of at most `limit` elements.

    They are square where the matrix is large, for then features are read from memory least often, and otherwise as wide
    as may be.
    """
    height = min(rows, math.isqrt(limit))
    for r in parts(rows, height):
        for c in parts(columns, limit // height):
            yield r, c


def parts(length: int, largest: int) -> list[slice]:
    """Cuts a range into the fewest parts of at most `largest`, equally long but for the last: no slow slivers."""
    count = -(-length // largest)
    size = -(-length // count)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def matching(tile: Tensor, rows: slice, columns: slice, first: int) -> tuple[Tensor, slice]:
    """Where images meet their own texts: a view of those elements of a tile, and the rows of the matrix they are in.

    Args:
        tile: [rows, columns], a part of the matrix own images × all texts.
        first: column of the text that belongs to row 0.
    """
    offset = first + rows.start - columns.start
    own = tile.diagonal(offset)
    start = rows.start + max(0, -offset)
    return own, slice(start, start + len(own))


def refuse_second_derivative() -> None:
    """To be called by a backward, which autograd would otherwise take for a constant where its input is one.

    `once_differentiable` sees only what depends on the gradient that comes in, not on the saved features.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the loss has no second derivative: its backward cannot be run with create_graph=True")
