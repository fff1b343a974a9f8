"""Quantization by the largest magnitude: of each row, of each column, or of the whole matrix.

A quantized matrix is a low-precision tensor `q` and float32 scales with x ≈ q · scale. An all-zero slice has scale 0,
values of a slice whose magnitudes are all at most 1e-30 are taken for zero, and a slice that holds NaN or infinity
has a scale that is NaN or infinite, so that products with it are not finite. Rounding is to nearest, half to even,
unless stochastic.

Source: the int8 scheme of LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipq.kernels.formats import check_dtype, empty_transposed
from clipq.kernels.quantize import reference
from clipq.kernels.register import register

_TRITON = "clipq.kernels.quantize.triton"


def _fake_rows(x: Tensor, dtype: torch.dtype, column_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    sums = x.new_empty(cols if column_sums else 0, dtype=torch.float32)
    return x.new_empty((rows, cols), dtype=dtype), x.new_empty(rows, dtype=torch.float32), sums


def _fake_pack(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = a.shape
    vectors = (a.new_empty(n, dtype=torch.float32) for n in (rows, 3 * cols))
    return (a.new_empty((rows, 3 * cols)), a.new_empty((rows, 3 * cols), dtype=dtype), *vectors)  # pyright: ignore[reportReturnType]


def _fake_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), empty_transposed(x, dtype), x.new_empty((), dtype=torch.float32)


def _fake_columns(x: Tensor, dtype: torch.dtype, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_transposed(x, dtype), x.new_empty(x.shape[1], dtype=torch.float32)


def _fake_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


_rows = register(
    "quantize_rows",
    "(Tensor x, ScalarType dtype, bool column_sums) -> (Tensor, Tensor, Tensor)",
    reference=reference.quantize_rows,
    fake=_fake_rows,
    module=_TRITON,
)
_pack = register(
    "pack_quantize_rows",
    "(Tensor a, Tensor b, Tensor c, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.pack_quantize_rows,
    fake=_fake_pack,
    module=_TRITON,
)
_tensor = register(
    "quantize_tensor",
    "(Tensor x, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.quantize_tensor,
    fake=_fake_tensor,
    module=_TRITON,
)
_columns = register(
    "quantize_columns",
    "(Tensor x, ScalarType dtype, Tensor? seed) -> (Tensor, Tensor)",
    reference=reference.quantize_columns,
    fake=_fake_columns,
    module=_TRITON,
)
_dequantize = register(
    "dequantize_rows",
    "(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_rows,
    fake=_fake_dequantize,
    module=_TRITON,
)


def quantize_rows(x: Tensor, dtype: torch.dtype, *, column_sums: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise quantization.

    Args:
        x: [M, K] of any floating type; unit stride along K is fast, other strides are copied first.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        column_sums: also return the sum over the rows of x, as a gradient of a bias needs it.

    Returns:
        q [M, K] of `dtype`, scale [M] float32, sums [K] float32 (or [0] if not asked for).
    """
    check_dtype(dtype)
    return _rows(x, dtype, column_sums)


def pack_quantize_rows(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row-wise quantization of three matrices side by side, as the gradients of queries, keys and values are.

    Args:
        a, b, c: [M, K] of one floating type; unit stride along K is fast, other strides are copied first.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        [a, b, c] [M, 3K] of their type, q [M, 3K] of `dtype`, scale [M] float32, sums over the rows [3K] float32.
    """
    check_dtype(dtype)
    return _pack(a, b, c, dtype)


def quantize_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantization with one scale, in both layouts.

    Args:
        x: [M, K] of any floating type.

    Returns:
        q [M, K] of `dtype`, its transpose [K, M] (unit stride along M, rows aligned to 128 bytes), scale [] float32.
    """
    check_dtype(dtype)
    return _tensor(x, dtype)


def quantize_columns(x: Tensor, dtype: torch.dtype, *, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Column-wise quantization, transposed: what a product that runs over the rows of x takes.

    Args:
        x: [M, K] of any floating type.
        seed: [] int64 on x's device: int8 is then rounded up or down at random, with the mean kept.

    Returns:
        qt [K, M] of `dtype` (unit stride along M, rows aligned to 128 bytes), scale [K] float32.

    Raises:
        ValueError: a seed with another type than int8.
    """
    check_dtype(dtype)
    if seed is not None and dtype is not torch.int8:
        raise ValueError(f"stochastic rounding is for int8, not {dtype}")
    return _columns(x, dtype, seed)


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q [M, K] · scale [M] -> [M, K] of the floating type `dtype`."""
    return _dequantize(q, scale, dtype)
