"""Triton kernels: GELU with the row-wise quantization of its output, and its gradient with that of the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipq.kernels.formats import QMAX
from clipq.kernels.rowwise import (
    RowBlock,
    column_sums,
    launch_rows,
    load_rows,
    quantize_store,
    row_programs,
    store_rows,
    store_sums,
    unit_stride,
)


@triton.jit
def _normal_tail(x):
    """Φ(-|x|) of the normal distribution, and exp(-x²/2), by formula 7.1.26 of Abramowitz and Stegun.

    Off by at most 7.5e-8. One exponential serves both, and no difference of near numbers is taken in the tail.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    e = tl.exp(-z * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return 0.5 * poly * e, e


@triton.jit
def _gate(x, QUICK: tl.constexpr):
    """What x is multiplied by, sigmoid(1.702 x) or Φ(x), and exp(-x²/2) for the gradient of the latter."""
    if QUICK:
        s = 1.0 / (1.0 + tl.exp(-1.702 * x))
        return s, s
    tail, e = _normal_tail(x)
    return tl.where(x < 0, tail, 1.0 - tail), e


@triton.jit
def _slope(x, gate, e, QUICK: tl.constexpr):
    """Derivative of x · gate."""
    if QUICK:
        return gate * (1.0 + 1.702 * x * (1.0 - gate))
    return gate + x * e * 0.3989422804014327


@triton.jit
def _gelu(x, QUICK: tl.constexpr):
    gate, _ = _gate(x, QUICK)
    return x * gate


@triton.jit
def _gelu_quantize_rows(
    x_ptr, y_ptr, q_ptr, scale_ptr,
    M, K, x_stride,
    QMAX: tl.constexpr, KEEP: tl.constexpr, QUICK: tl.constexpr, R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols0, cols1 = tl.arange(0, B0), B0 + tl.arange(0, B1)
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, R)
        y0 = _gelu(load_rows(x_ptr, rows, cols0, M, K, x_stride), QUICK).to(y_ptr.dtype.element_ty)
        y1 = _gelu(load_rows(x_ptr, rows, cols1, M, K, x_stride), QUICK).to(y_ptr.dtype.element_ty)
        if KEEP:
            store_rows(y_ptr, y0, rows, cols0, M, K, K)
            store_rows(y_ptr, y1, rows, cols1, M, K, K)
        # what is quantized is the rounded output, as if activation and quantization were two steps
        quantize_store(q_ptr, scale_ptr, y0.to(tl.float32), y1.to(tl.float32), rows, cols0, cols1, M, K, QMAX)


@triton.jit
def _gelu_backward_quantize_rows(
    dy_ptr, x_ptr, dx_ptr, q_ptr, scale_ptr, sums_ptr, y_ptr,
    M, K, x_stride,
    QMAX: tl.constexpr, KEEP: tl.constexpr, QUICK: tl.constexpr, R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dy · gelu'(x), stored and quantized; each program leaves the sum of its rows, column by column.

    With KEEP also y = gelu(x), for which x need not be read once more.
    """
    cols0, cols1 = tl.arange(0, B0), B0 + tl.arange(0, B1)
    sums0, sums1 = tl.zeros((R, B0), tl.float32), tl.zeros((R, B1), tl.float32)
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, R)
        x0 = load_rows(x_ptr, rows, cols0, M, K, x_stride)
        x1 = load_rows(x_ptr, rows, cols1, M, K, x_stride)
        gate0, e0 = _gate(x0, QUICK)
        gate1, e1 = _gate(x1, QUICK)
        if KEEP:
            store_rows(y_ptr, (x0 * gate0).to(y_ptr.dtype.element_ty), rows, cols0, M, K, K)
            store_rows(y_ptr, (x1 * gate1).to(y_ptr.dtype.element_ty), rows, cols1, M, K, K)
        dx0 = load_rows(dy_ptr, rows, cols0, M, K, K) * _slope(x0, gate0, e0, QUICK)
        dx1 = load_rows(dy_ptr, rows, cols1, M, K, K) * _slope(x1, gate1, e1, QUICK)
        dx0, dx1 = dx0.to(dx_ptr.dtype.element_ty), dx1.to(dx_ptr.dtype.element_ty)
        store_rows(dx_ptr, dx0, rows, cols0, M, K, K)
        store_rows(dx_ptr, dx1, rows, cols1, M, K, K)
        dx0, dx1 = dx0.to(tl.float32), dx1.to(tl.float32)
        quantize_store(q_ptr, scale_ptr, dx0, dx1, rows, cols0, cols1, M, K, QMAX)
        sums0 += dx0
        sums1 += dx1
    store_sums(sums_ptr, sums0, sums1, cols0, cols1, K, K)


def _forward_block(cols: int) -> RowBlock:
    """Measured on H100s at 33,024 rows."""
    if cols <= 2048:
        return RowBlock(1, 4 if cols <= 1536 else 8)
    return RowBlock(1, 8, 4, 3) if cols <= 3072 else RowBlock(1, 16, 2, 3)


def _backward_block(cols: int) -> RowBlock:
    """Measured on H100s at 33,024 rows."""
    return RowBlock(1, 4, 4, 3) if cols <= 2048 else RowBlock(1, 8, 2, 3)


def gelu_quantize(x: Tensor, quick: bool, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = unit_stride(x)
    rows, cols = x.shape
    y = x.new_empty((rows, cols) if keep else (0,))
    q, scale = x.new_empty((rows, cols), dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    launch_rows(
        *(_gelu_quantize_rows, x, _forward_block(cols), x, y, q, scale, rows, cols, x.stride(0)),
        reads=1,
        QMAX=QMAX[dtype],
        KEEP=keep,
        QUICK=quick,
    )
    return y, q, scale


def gelu_backward_quantize(
    dy: Tensor, x: Tensor, quick: bool, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dy = unit_stride(x), dy.contiguous()
    rows, cols = x.shape
    dx, q = x.new_empty((rows, cols)), x.new_empty((rows, cols), dtype=dtype)
    scale, y = x.new_empty(rows, dtype=torch.float32), x.new_empty((rows, cols) if keep else (0,))
    block = _backward_block(cols)
    shares = x.new_empty((1, row_programs(x, block), cols), dtype=torch.float32)
    launch_rows(
        *(_gelu_backward_quantize_rows, x, block, dy, x, dx, q, scale, shares, y, rows, cols, x.stride(0)),
        reads=2,
        QMAX=QMAX[dtype],
        KEEP=keep,
        QUICK=quick,
    )
    return dx, q, scale, column_sums(shares)[0], y
