"""What the Triton kernels over rows have in common: loading, row-wise quantization, sums over rows, launch shapes.

Kernels over rows take R rows at a time, each in two parts: B0 columns, the largest power of two that a row fills, and
B1 for the rest. One power of two above K would leave up to half of the lanes idle.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipq.kernels.formats import TINY
from clipq.kernels.launch import launch

# Adding 1.5 · 2^23 to a float32 of at most 2^22 rounds it half to even and leaves the integer in the low bits.
MAGIC = tl.constexpr(12582912.0)
LEAST = tl.constexpr(TINY)


@triton.jit
def load_rows(ptr, rows, cols, M, K, stride):
    """[R, B] float32, zero outside of the matrix."""
    at = tl.cast(rows, tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(ptr + at, mask=(rows < M)[:, None] & (cols < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, x, rows, cols, M, K, stride):
    """Stores [R, B] into a matrix of K columns."""
    at = tl.cast(rows, tl.int64)[:, None] * stride + cols[None, :]
    tl.store(ptr + at, x, mask=(rows < M)[:, None] & (cols < K)[None, :])


@triton.jit
def magnitude_bits(x):
    """Bits of |x|: as integers they have the order of the magnitudes, with infinity and NaN on top.

    A maximum of floats would drop NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def rows_absmax(x0, x1):
    """Largest magnitude of each row, [R]; not finite where an element is not."""
    bits = tl.maximum(tl.max(magnitude_bits(x0), axis=1), tl.max(magnitude_bits(x1), axis=1))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inverse_scale(amax, QMAX: tl.constexpr):
    """What to multiply by before rounding; 0 where all of it is taken for zero."""
    return tl.where(amax > LEAST, QMAX / amax, 0.0)


@triton.jit
def encode(v, DTYPE: tl.constexpr):
    """Scaled float32 values -> the low-precision type, rounded half to even."""
    if tl.int8 == DTYPE:
        return (v + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    return v.to(DTYPE)


@triton.jit
def quantize_store(q_ptr, scale_ptr, x0, x1, rows, cols0, cols1, M, K, QMAX: tl.constexpr):
    """Row-wise quantization of rows that are in registers."""
    amax = rows_absmax(x0, x1)
    inverse = inverse_scale(amax, QMAX)[:, None]
    store_rows(q_ptr, encode(x0 * inverse, q_ptr.dtype.element_ty), rows, cols0, M, K, K)
    store_rows(q_ptr, encode(x1 * inverse, q_ptr.dtype.element_ty), rows, cols1, M, K, K)
    tl.store(scale_ptr + rows, amax / QMAX, mask=rows < M)


@triton.jit
def store_sums(ptr, sums0, sums1, cols0, cols1, K, stride):
    """This program's share of a sum over rows: K columns of row `program_id` of a matrix, for `column_sums`."""
    base = ptr + tl.cast(tl.program_id(0), tl.int64) * stride
    tl.store(base + cols0, tl.sum(sums0, axis=0), mask=cols0 < K)
    tl.store(base + cols1, tl.sum(sums1, axis=0), mask=cols1 < K)


@triton.jit
def _sum_rows(x_ptr, first_ptr, second_ptr, P, K, BP: tl.constexpr, BK: tl.constexpr):
    """Sums over the rows of the one or two matrices [P, K] of a stack, always in the same order."""
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    x_ptr += tl.cast(tl.program_id(1), tl.int64) * P * K
    sums = tl.zeros((BP, BK), tl.float32)
    for first in range(0, P, BP):
        sums += load_rows(x_ptr, first + tl.arange(0, BP), cols, P, K, K)
    out_ptr = first_ptr if tl.program_id(1) == 0 else second_ptr
    tl.store(out_ptr + cols, tl.sum(sums, axis=0), mask=cols < K)


def column_sums(shares: Tensor) -> list[Tensor]:
    """[S, P, K] float32, as programs left it with `store_sums` -> S tensors [K] that share no memory; S is 1 or 2."""
    count, programs, cols = shares.shape
    sums = [shares.new_empty(cols) for _ in range(count)]
    launch(
        *(_sum_rows, (triton.cdiv(cols, 16), count), shares, sums[0], sums[-1], programs, cols),
        constants={"BP": 512, "BK": 16},
        warps=8,
    )
    return sums


class RowBlock(NamedTuple):
    """How a kernel over rows is launched."""

    rows: int
    """R: rows that a program takes at a time."""
    warps: int
    programs: int = 0
    """Programs for each multiprocessor, where every program walks over many rows; 0 for one program for each R rows."""
    stages: int = 1
    """Steps of that walk whose loads are under way at once, held in shared memory."""


SHARED_BYTES = 90 * 1024
"""Shared memory that the loads under way may take: what any GPU since Ampere gives a program, less room for sums."""


def launch_rows(kernel: Any, x: Tensor, block: RowBlock, *args: Any, reads: int, **constants: Any) -> None:
    """Launches a kernel over the rows of x [M, K] with its block sizes.

    Args:
        reads: rows that it reads for each row of x, of at most x's type; too wide ones are not read ahead.
    """
    cols = max(1, x.shape[1])
    first = 1 << (cols.bit_length() - 1)
    rest = triton.next_power_of_2(max(1, cols - first))
    ahead = reads * (block.stages - 1) * block.rows * (first + rest) * x.element_size()
    blocks = {"R": block.rows, "B0": first, "B1": rest, "STAGES": block.stages if ahead <= SHARED_BYTES else 1}
    launch(kernel, (row_programs(x, block),), *args, constants=constants | blocks, warps=block.warps)


def row_programs(x: Tensor, block: RowBlock) -> int:
    """Programs that `launch_rows` starts: at most one for each R rows, at least one."""
    most = triton.cdiv(x.shape[0], block.rows)
    if block.programs:
        most = min(most, block.programs * multiprocessors(x.device))
    return max(1, most)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: few, so that programs do walk over several rows
    return torch.cuda.get_device_properties(device).multi_processor_count


def unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not the dense one."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
