"""Triton kernels: layer norm with the row-wise quantization of its output, and the gradient of layer norm."""

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
def _vector(ptr, cols, K):
    return tl.load(ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _mean(x0, x1, K):
    return ((tl.sum(x0, axis=1) + tl.sum(x1, axis=1)) / K)[:, None]


@triton.jit
def _centred(x, mean, cols, K):
    return tl.where((cols < K)[None, :], x - mean, 0.0)


@triton.jit
def _norm_quantize_rows(
    x_ptr, w_ptr, b_ptr, y_ptr, q_ptr, scale_ptr, mean_ptr, rstd_ptr,
    M, K, x_stride, eps,
    QMAX: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols0, cols1 = tl.arange(0, B0), B0 + tl.arange(0, B1)
    w0, w1 = _vector(w_ptr, cols0, K), _vector(w_ptr, cols1, K)
    b0, b1 = _vector(b_ptr, cols0, K), _vector(b_ptr, cols1, K)
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, R)
        x0 = load_rows(x_ptr, rows, cols0, M, K, x_stride)
        x1 = load_rows(x_ptr, rows, cols1, M, K, x_stride)
        mean = _mean(x0, x1, K)
        x0, x1 = _centred(x0, mean, cols0, K), _centred(x1, mean, cols1, K)
        rstd = 1.0 / tl.sqrt(_mean(x0 * x0, x1 * x1, K) + eps)
        y0 = (x0 * rstd * w0 + b0).to(y_ptr.dtype.element_ty)
        y1 = (x1 * rstd * w1 + b1).to(y_ptr.dtype.element_ty)
        if KEEP:
            store_rows(y_ptr, y0, rows, cols0, M, K, K)
            store_rows(y_ptr, y1, rows, cols1, M, K, K)
        # what is quantized is the rounded output, as if norm and quantization were two steps
        quantize_store(q_ptr, scale_ptr, y0.to(tl.float32), y1.to(tl.float32), rows, cols0, cols1, M, K, QMAX)
        at = rows[:, None]
        tl.store(mean_ptr + at, mean, mask=at < M)
        tl.store(rstd_ptr + at, rstd, mask=at < M)


@triton.jit
def _norm_backward_rows(
    dy_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, residual_ptr, dx_ptr, dw_ptr, db_ptr, y_ptr,
    M, K, x_stride,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Input gradient, plus that of a residual branch; each program leaves its rows' share of the gradients of w and b.

    With KEEP also the norm's output y, for which x need not be read once more.
    """
    cols0, cols1 = tl.arange(0, B0), B0 + tl.arange(0, B1)
    w0, w1 = _vector(w_ptr, cols0, K), _vector(w_ptr, cols1, K)
    dw0, dw1 = tl.zeros((R, B0), tl.float32), tl.zeros((R, B1), tl.float32)
    db0, db1 = tl.zeros((R, B0), tl.float32), tl.zeros((R, B1), tl.float32)
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, R)
        dy0 = load_rows(dy_ptr, rows, cols0, M, K, K)
        dy1 = load_rows(dy_ptr, rows, cols1, M, K, K)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        n0 = _centred(load_rows(x_ptr, rows, cols0, M, K, x_stride), mean, cols0, K) * rstd
        n1 = _centred(load_rows(x_ptr, rows, cols1, M, K, x_stride), mean, cols1, K) * rstd
        if KEEP:
            y0, y1 = n0 * w0 + _vector(b_ptr, cols0, K), n1 * w1 + _vector(b_ptr, cols1, K)
            store_rows(y_ptr, y0.to(y_ptr.dtype.element_ty), rows, cols0, M, K, K)
            store_rows(y_ptr, y1.to(y_ptr.dtype.element_ty), rows, cols1, M, K, K)
        dw0 += dy0 * n0
        dw1 += dy1 * n1
        db0 += dy0
        db1 += dy1
        g0, g1 = dy0 * w0, dy1 * w1
        mean_g, mean_gn = _mean(g0, g1, K), _mean(g0 * n0, g1 * n1, K)
        dx0, dx1 = (g0 - mean_g - n0 * mean_gn) * rstd, (g1 - mean_g - n1 * mean_gn) * rstd
        if RESIDUAL:
            dx0 += load_rows(residual_ptr, rows, cols0, M, K, K)
            dx1 += load_rows(residual_ptr, rows, cols1, M, K, K)
        store_rows(dx_ptr, dx0.to(dx_ptr.dtype.element_ty), rows, cols0, M, K, K)
        store_rows(dx_ptr, dx1.to(dx_ptr.dtype.element_ty), rows, cols1, M, K, K)
    store_sums(dw_ptr, dw0, dw1, cols0, cols1, K, K)
    store_sums(db_ptr, db0, db1, cols0, cols1, K, K)


def _forward_block(cols: int) -> RowBlock:
    """Measured on one H100 at 33,024 rows."""
    return RowBlock(1, 1, 32, 3) if cols <= 1536 else RowBlock(1, 4)


def _backward_block(cols: int) -> RowBlock:
    """Measured on one H100 at 33,024 rows."""
    return RowBlock(1, 2, 8, 3) if cols <= 768 else RowBlock(1, 4, 4, 3)


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = unit_stride(x), weight.contiguous(), bias.contiguous()
    rows, cols = x.shape
    y = x.new_empty((rows, cols) if keep else (0,), dtype=out_dtype)
    q = x.new_empty((rows, cols), dtype=dtype)
    scale, mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
    launch_rows(
        *(_norm_quantize_rows, x, _forward_block(cols), x, weight, bias, y, q, scale, mean, rstd),
        *(rows, cols, x.stride(0), eps),
        reads=1,
        QMAX=QMAX[dtype],
        KEEP=keep,
    )
    return y, q, scale, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, dy = unit_stride(x), dy.contiguous()
    weight, mean, rstd = weight.contiguous(), mean.contiguous(), rstd.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, cols = x.shape
    dx, y = x.new_empty((rows, cols)), dy.new_empty((0,) if bias is None else (rows, cols))
    block = _backward_block(cols)
    shares = x.new_empty((2, row_programs(x, block), cols), dtype=torch.float32)
    launch_rows(
        *(_norm_backward_rows, x, block, dy, x, weight, weight if bias is None else bias, mean, rstd),
        *(dy if residual is None else residual.contiguous(), dx, shares[0], shares[1], y, rows, cols, x.stride(0)),
        reads=5,  # the norm's bias, of float32, too
        RESIDUAL=residual is not None,
        KEEP=bias is not None,
    )
    return dx, *column_sums(shares), y  # pyright: ignore[reportReturnType]
