"""Triton kernels that quantize to int8 or fp8.

Shape suffixes: M rows (tokens), K columns.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipq.kernels.formats import QMAX, empty_transposed
from clipq.kernels.launch import launch
from clipq.kernels.quantize import reference
from clipq.kernels.register import least_capability
from clipq.kernels.rowwise import (
    RowBlock,
    column_sums,
    encode,
    inverse_scale,
    launch_rows,
    load_rows,
    magnitude_bits,
    quantize_store,
    row_programs,
    rows_absmax,
    store_rows,
    store_sums,
    unit_stride,
)


@triton.jit
def _quantize_rows(
    x_ptr, q_ptr, scale_ptr, sums_ptr,
    M, K, x_stride,
    QMAX: tl.constexpr, SUMS: tl.constexpr, R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With SUMS each program also leaves the sum of its rows, column by column."""
    cols0, cols1 = tl.arange(0, B0), B0 + tl.arange(0, B1)
    sums0, sums1 = tl.zeros((R, B0), tl.float32), tl.zeros((R, B1), tl.float32)
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, R)
        x0 = load_rows(x_ptr, rows, cols0, M, K, x_stride)
        x1 = load_rows(x_ptr, rows, cols1, M, K, x_stride)
        quantize_store(q_ptr, scale_ptr, x0, x1, rows, cols0, cols1, M, K, QMAX)
        if SUMS:
            sums0 += x0
            sums1 += x1
    if SUMS:
        store_sums(sums_ptr, sums0, sums1, cols0, cols1, K, K)


@triton.jit
def _pack_quantize_rows(
    a_ptr, b_ptr, c_ptr, packed_ptr, q_ptr, scale_ptr, sums_ptr,
    M, K, a_stride, b_stride, c_stride,
    QMAX: tl.constexpr, R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_quantize_rows` with sums, over the rows of [a, b, c], which are put together on the way."""
    cols0, cols1 = tl.arange(0, B0), B0 + tl.arange(0, B1)
    a_sums0, a_sums1 = tl.zeros((R, B0), tl.float32), tl.zeros((R, B1), tl.float32)
    b_sums0, b_sums1 = tl.zeros((R, B0), tl.float32), tl.zeros((R, B1), tl.float32)
    c_sums0, c_sums1 = tl.zeros((R, B0), tl.float32), tl.zeros((R, B1), tl.float32)
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, R)
        a0 = load_rows(a_ptr, rows, cols0, M, K, a_stride)
        a1 = load_rows(a_ptr, rows, cols1, M, K, a_stride)
        b0 = load_rows(b_ptr, rows, cols0, M, K, b_stride)
        b1 = load_rows(b_ptr, rows, cols1, M, K, b_stride)
        c0 = load_rows(c_ptr, rows, cols0, M, K, c_stride)
        c1 = load_rows(c_ptr, rows, cols1, M, K, c_stride)
        # as integers: a maximum of floats would drop NaN
        bits = tl.maximum(magnitude_bits(rows_absmax(a0, a1)), magnitude_bits(rows_absmax(b0, b1)))
        amax = tl.maximum(bits, magnitude_bits(rows_absmax(c0, c1))).to(tl.float32, bitcast=True)
        inverse = inverse_scale(amax, QMAX)[:, None]
        _store_part(packed_ptr, q_ptr, a0, a1, inverse, rows, cols0, cols1, M, K)
        _store_part(packed_ptr + K, q_ptr + K, b0, b1, inverse, rows, cols0, cols1, M, K)
        _store_part(packed_ptr + 2 * K, q_ptr + 2 * K, c0, c1, inverse, rows, cols0, cols1, M, K)
        tl.store(scale_ptr + rows, amax / QMAX, mask=rows < M)
        a_sums0, a_sums1 = a_sums0 + a0, a_sums1 + a1
        b_sums0, b_sums1 = b_sums0 + b0, b_sums1 + b1
        c_sums0, c_sums1 = c_sums0 + c0, c_sums1 + c1
    store_sums(sums_ptr, a_sums0, a_sums1, cols0, cols1, K, 3 * K)
    store_sums(sums_ptr + K, b_sums0, b_sums1, cols0, cols1, K, 3 * K)
    store_sums(sums_ptr + 2 * K, c_sums0, c_sums1, cols0, cols1, K, 3 * K)


@triton.jit
def _store_part(packed_ptr, q_ptr, x0, x1, inverse, rows, cols0, cols1, M, K):
    """A third of the rows of a packed matrix, as it is and quantized."""
    packed: tl.constexpr = packed_ptr.dtype.element_ty
    store_rows(packed_ptr, x0.to(packed), rows, cols0, M, K, 3 * K)
    store_rows(packed_ptr, x1.to(packed), rows, cols1, M, K, 3 * K)
    store_rows(q_ptr, encode(x0 * inverse, q_ptr.dtype.element_ty), rows, cols0, M, K, 3 * K)
    store_rows(q_ptr, encode(x1 * inverse, q_ptr.dtype.element_ty), rows, cols1, M, K, 3 * K)


@triton.jit
def _absmax_flat(x_ptr, amax_ptr, size, BLOCK: tl.constexpr):
    """Largest magnitude of a contiguous tensor as the bits of a float32 in an int32 that was 0."""
    at = (tl.full((), 0, tl.int64) + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.atomic_max(amax_ptr, tl.max(magnitude_bits(x), axis=0))


@triton.jit
def _absmax_columns(x_ptr, amax_ptr, M, K, x_stride, BM: tl.constexpr, BK: tl.constexpr):
    """As `absmax_flat`, for each column of a matrix."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    x = load_rows(x_ptr, rows, cols, M, K, x_stride)
    tl.atomic_max(amax_ptr + cols, tl.max(magnitude_bits(x), axis=0), mask=cols < K)


@triton.jit
def _uniform(x):
    """Hash of an integer, as a float32 in [0, 1): "lowbias32" (Wellons 2018)."""
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _quantize_transpose(
    x_ptr, q_ptr, qt_ptr, amax_ptr, scale_ptr, seed_ptr,
    M, K, x_stride, qt_stride,
    QMAX: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PER_COLUMN: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Quantizes by a known absmax: of each column, and writes the transpose; or of the tensor, and writes both layouts."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    x = load_rows(x_ptr, rows, cols, M, K, x_stride)
    if PER_COLUMN:
        amax = tl.load(amax_ptr + cols, mask=cols < K, other=0).to(tl.float32, bitcast=True)
        v = x * inverse_scale(amax, QMAX)[None, :]
        if STOCHASTIC:
            at = tl.cast(rows, tl.int64)[:, None] * K + cols[None, :]
            v = tl.minimum(tl.maximum(tl.floor(v + _uniform(tl.load(seed_ptr) + at)), -QMAX), QMAX)
        q = encode(v, qt_ptr.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + cols, amax / QMAX, mask=cols < K)
    else:
        amax = tl.load(amax_ptr).to(tl.float32, bitcast=True)
        q = encode(x * inverse_scale(amax, QMAX), qt_ptr.dtype.element_ty)
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(scale_ptr, amax / QMAX)
    if not PER_COLUMN:
        store_rows(q_ptr, q, rows, cols, M, K, K)
    at = tl.cast(cols, tl.int64)[:, None] * qt_stride + rows[None, :]
    tl.store(qt_ptr + at, q.T, mask=(cols < K)[:, None] & (rows < M)[None, :])


@triton.jit
def _dequantize_rows(
    q_ptr, scale_ptr, x_ptr,
    M, K, q_stride,
    R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols0, cols1 = tl.arange(0, B0), B0 + tl.arange(0, B1)
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, R)
        scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
        x0 = load_rows(q_ptr, rows, cols0, M, K, q_stride) * scale
        x1 = load_rows(q_ptr, rows, cols1, M, K, q_stride) * scale
        store_rows(x_ptr, x0.to(x_ptr.dtype.element_ty), rows, cols0, M, K, K)
        store_rows(x_ptr, x1.to(x_ptr.dtype.element_ty), rows, cols1, M, K, K)


def _row_block(cols: int, sums: bool) -> RowBlock:
    """Measured on H100s at 33,024 rows."""
    if not sums:
        return RowBlock(1, 4) if cols >= 2048 else RowBlock(2, 1)
    if cols >= 2048:
        return RowBlock(1, 8, 2, 4)
    return RowBlock(4, 2, 2, 4) if cols >= 1024 else RowBlock(4, 1, 4, 3)


@functools.cache
def _lacks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton cannot convert to the type there: simulated fp8 on an older GPU takes torch's own conversion."""
    if dtype is torch.int8 or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) < least_capability(dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype, with_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    if _lacks(x.device, dtype):
        return reference.quantize_rows(x.contiguous(), dtype, with_sums)
    x = unit_stride(x)
    rows, cols = x.shape
    q, scale = x.new_empty((rows, cols), dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    block = _row_block(cols, with_sums)
    shares = x.new_empty((1, row_programs(x, block) if with_sums else 0, cols), dtype=torch.float32)
    launch_rows(
        *(_quantize_rows, x, block, x, q, scale, shares, rows, cols, x.stride(0)),
        reads=1,
        QMAX=QMAX[dtype],
        SUMS=with_sums,
    )
    return q, scale, column_sums(shares)[0] if with_sums else shares.view(-1)


def pack_quantize_rows(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _lacks(a.device, dtype):
        return reference.pack_quantize_rows(a, b, c, dtype)
    a, b, c = unit_stride(a), unit_stride(b), unit_stride(c)
    rows, cols = a.shape
    packed, q = a.new_empty((rows, 3 * cols)), a.new_empty((rows, 3 * cols), dtype=dtype)
    scale = a.new_empty(rows, dtype=torch.float32)
    # fewer warps could not hold wide rows in registers
    block = RowBlock(1, 4, 3, 3) if cols <= 1536 else RowBlock(1, 8, 2, 4)
    shares = a.new_empty((1, row_programs(a, block), 3 * cols), dtype=torch.float32)
    launch_rows(
        *(_pack_quantize_rows, a, block, a, b, c, packed, q, scale, shares),
        *(rows, cols, a.stride(0), b.stride(0), c.stride(0)),
        reads=3,
        QMAX=QMAX[dtype],
    )
    return packed, q, scale, column_sums(shares)[0]


BLOCK = 8192
"""Elements that a program of `_absmax_flat` reads."""
TILE = 64
"""Side of the tiles that are transposed."""


def _tiles(x: Tensor) -> tuple[int, int]:
    return max(1, triton.cdiv(x.shape[0], TILE)), max(1, triton.cdiv(x.shape[1], TILE))


def quantize_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if _lacks(x.device, dtype):
        return reference.quantize_tensor(x.contiguous(), dtype)
    x = x.contiguous()
    q, qt = x.new_empty(x.shape, dtype=dtype), empty_transposed(x, dtype)
    scale = x.new_empty((), dtype=torch.float32)
    amax = x.new_zeros(1, dtype=torch.int32)
    launch(
        *(_absmax_flat, (triton.cdiv(x.numel(), BLOCK),), x, amax, x.numel()),
        constants={"BLOCK": BLOCK},
        warps=8,
    )
    _transpose(x, q, qt, amax, scale, None)
    return q, qt, scale


def quantize_columns(x: Tensor, dtype: torch.dtype, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if _lacks(x.device, dtype):
        return reference.quantize_columns(x.contiguous(), dtype, seed)
    x = unit_stride(x)
    qt, scale = empty_transposed(x, dtype), x.new_empty(x.shape[1], dtype=torch.float32)
    amax = x.new_zeros(x.shape[1], dtype=torch.int32)
    rows, cols = x.shape
    launch(
        *(_absmax_columns, (triton.cdiv(rows, 256), triton.cdiv(cols, TILE)), x, amax, rows, cols, x.stride(0)),
        constants={"BM": 256, "BK": TILE},
        warps=8,
    )
    _transpose(x, None, qt, amax, scale, seed)
    return qt, scale


def _transpose(x: Tensor, q: Tensor | None, qt: Tensor, amax: Tensor, scale: Tensor, seed: Tensor | None) -> None:
    rows, cols = x.shape
    launch(
        *(_quantize_transpose, _tiles(x), x, qt if q is None else q, qt, amax, scale, amax if seed is None else seed),
        *(rows, cols, x.stride(0), qt.stride(0)),
        constants={
            "QMAX": QMAX[qt.dtype],
            "BM": TILE,
            "BK": TILE,
            "PER_COLUMN": q is None,
            "STOCHASTIC": seed is not None,
        },
    )


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    q, scale = unit_stride(q), scale.contiguous()
    x = q.new_empty(q.shape, dtype=dtype)
    launch_rows(_dequantize_rows, q, _row_block(q.shape[1], False), q, scale, x, *q.shape, q.stride(0), reads=1)
    return x
