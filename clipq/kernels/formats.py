"""Low-precision types, and the layout of transposed matrices."""

from __future__ import annotations

import torch
from torch import Tensor

QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""Low-precision types and the largest magnitude that each holds."""

TINY = 1e-30
"""A slice whose magnitudes are all at most this is taken for zero: the inverse of its scale would overflow."""

MOST_TERMS = 131072
"""Products of int8 whose sum is sure to fit into int32: 127² of them are less than 2³¹."""

ALIGN = 128
"""Rows of a transposed matrix start at multiples of so many bytes: TMA asks for 16, and a line of the cache has 128."""


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError unless `dtype` is a low-precision type."""
    if dtype not in QMAX:
        raise ValueError(f"{dtype}: expected one of {', '.join(map(str, QMAX))}")


def empty_transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised [K, M] for x [M, K], with aligned rows.

    Never contiguous: torch.compile would need one graph for each of the two layouts.
    """
    rows, cols = x.shape
    padded = rows // ALIGN * ALIGN + ALIGN
    return x.new_empty((cols, padded), dtype=dtype)[:, :rows]
