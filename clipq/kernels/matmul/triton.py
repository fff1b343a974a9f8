"""Triton kernels of the low-precision product: a persistent one with TMA for Hopper, one with pointers for other GPUs.

Shape suffixes: M rows of the output (tokens), N its columns, K the inner dimension.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clipq.kernels.formats import MOST_TERMS
from clipq.kernels.launch import launch
from clipq.kernels.register import has_tma
from clipq.kernels.rowwise import multiprocessors, unit_stride


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel."""

    m: int
    n: int
    k: int
    group: int
    """Rows of tiles that are walked together, so that their operands stay in the L2 cache."""
    warps: int
    stages: int
    split: int = 1
    """Parts in which the epilogue goes out: a smaller buffer for the output leaves shared memory for the pipeline."""
    programs: int = 0
    """Programs for each multiprocessor (persistent); 0 for one program for each tile."""


@triton.jit
def _dequantize(
    acc,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    rows,
    cols,
    M,
    N,
    A_PER_ROW: tl.constexpr,
    B_PER_COLUMN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """int32 or fp32 accumulator of a tile -> fp32 output: acc · a_scale · b_scale + bias."""
    if A_PER_ROW:
        a_scale = tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
    else:
        a_scale = tl.load(a_scale_ptr + rows * 0)
    if B_PER_COLUMN:
        b_scale = tl.load(b_scale_ptr + cols, mask=cols < N, other=0.0)
        out = acc.to(tl.float32) * a_scale[:, None] * b_scale[None, :]
    else:
        out = acc.to(tl.float32) * (a_scale * tl.load(b_scale_ptr))[:, None]
    if BIAS:
        out += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def _tile_origin(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile, in an order that walks down GROUP rows of tiles before the next column."""
    tiles_m = tl.cdiv(M, BM)
    per_group = GROUP * tl.cdiv(N, BN)
    first = (tile // per_group) * GROUP
    height = min(tiles_m - first, GROUP)
    inside = tile % per_group
    return (first + inside % height) * BM, (inside // height) * BN


@triton.jit
def _finish(
    acc, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
    BM: tl.constexpr, PART: tl.constexpr, A_PER_ROW: tl.constexpr, B_PER_COLUMN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Epilogue of a part of a tile that is PART columns wide."""
    rows, cols = m + tl.arange(0, BM), n + tl.arange(0, PART)
    out = _dequantize(acc, a_scale_ptr, b_scale_ptr, bias_ptr, rows, cols, M, N, A_PER_ROW, B_PER_COLUMN, BIAS)
    if RESIDUAL:
        out += residual_desc.load([m, n]).to(tl.float32)
    c_desc.store([m, n], out.to(c_desc.dtype))


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    return acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def _matmul_tma(
    a_desc, b_desc, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr,
    M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    A_PER_ROW: tl.constexpr, B_PER_COLUMN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Persistent: each program walks over tiles, and the loads of the next tile start during the epilogue of this one.

    Two programs of 128 × 128 share a multiprocessor: one's epilogue runs beside the other's products.
    """
    H: tl.constexpr = BN // 2
    Q: tl.constexpr = BN // 4
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):  # pyright: ignore[reportGeneralTypeIssues]
        m, n = _tile_origin(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), dtype=ACC)
        for k in range(0, K, BK):
            acc = tl.dot(a_desc.load([m, k]), b_desc.load([n, k]).T, acc, out_dtype=ACC)
        left, right = _halves(acc, BM, BN)
        if SPLIT == 2:
            _finish(left, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
                    BM, H, A_PER_ROW, B_PER_COLUMN, BIAS, RESIDUAL)  # fmt: skip
            _finish(right, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr, m, n + H, M, N,
                    BM, H, A_PER_ROW, B_PER_COLUMN, BIAS, RESIDUAL)  # fmt: skip
        else:
            part0, part1 = _halves(left, BM, H)
            part2, part3 = _halves(right, BM, H)
            _finish(part0, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
                    BM, Q, A_PER_ROW, B_PER_COLUMN, BIAS, RESIDUAL)  # fmt: skip
            _finish(part1, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr, m, n + Q, M, N,
                    BM, Q, A_PER_ROW, B_PER_COLUMN, BIAS, RESIDUAL)  # fmt: skip
            _finish(part2, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr, m, n + H, M, N,
                    BM, Q, A_PER_ROW, B_PER_COLUMN, BIAS, RESIDUAL)  # fmt: skip
            _finish(part3, c_desc, residual_desc, a_scale_ptr, b_scale_ptr, bias_ptr, m, n + H + Q, M, N,
                    BM, Q, A_PER_ROW, B_PER_COLUMN, BIAS, RESIDUAL)  # fmt: skip


@triton.jit
def _matmul_pointers(
    a_ptr, b_ptr, c_ptr, residual_ptr, a_scale_ptr, b_scale_ptr, bias_ptr,
    M, N, K, a_stride, b_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
    A_PER_ROW: tl.constexpr, B_PER_COLUMN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One tile for each program, any stride: Ampere, Ada, and shapes that the tensor memory accelerator does not take."""
    m, n = _tile_origin(tl.program_id(0), M, N, BM, BN, GROUP)
    rows, cols, inner = m + tl.arange(0, BM), n + tl.arange(0, BN), tl.arange(0, BK)
    a_at = a_ptr + tl.cast(rows, tl.int64)[:, None] * a_stride + inner[None, :]
    b_at = b_ptr + tl.cast(cols, tl.int64)[None, :] * b_stride + inner[:, None]
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        left = inner < K - k
        a = tl.load(a_at + k, mask=(rows < M)[:, None] & left[None, :], other=0.0)
        b = tl.load(b_at + k, mask=left[:, None] & (cols < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
    out = _dequantize(acc, a_scale_ptr, b_scale_ptr, bias_ptr, rows, cols, M, N, A_PER_ROW, B_PER_COLUMN, BIAS)
    at = tl.cast(rows, tl.int64)[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if RESIDUAL:
        out += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(c_ptr + at, out.to(c_ptr.dtype.element_ty), mask=mask)


def hopper_tile(K: int, *, int8: bool, residual: bool, out_bytes: int) -> Tile:
    """Measured on one H100 at M = 33,024 and 19,712, N and K of ViT-B, -L and -H.

    Two programs share the 227 KB of a multiprocessor: stages · 32 KB, a part of the output, and one of the residual.
    """
    if out_bytes > 2:
        return Tile(128, 128, 128, 8, 4, 2 if residual else 3, 4, 2)
    if residual:
        return Tile(128, 128, 128, 8, 4, 3, 4, 2) if int8 and K < 3072 else Tile(128, 256, 128, 8, 8, 3, 2, 1)
    if int8 and K <= 4096:
        return Tile(128, 128, 128, 4, 4, 3, 2, 2) if K < 3072 else Tile(128, 128, 128, 4, 4, 3, 4, 2)
    return Tile(128, 256, 128, 4, 8, 4, 2, 1)


POINTER_TILE = Tile(128, 128, 64, 8, 8, 3)
"""For every other GPU: fits the 99 KB of shared memory of consumer cards. Not tuned."""


def _takes_tma(*tensors: Tensor | None) -> bool:
    """Whether the tensor memory accelerator can address these matrices."""
    return all(
        t.stride(-1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
        if t is not None
    )


def matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if a.dtype is torch.int8 and a.shape[1] > MOST_TERMS:  # the sums of the rest come in as the residual
        rest = matmul(a[:, MOST_TERMS:], b[:, MOST_TERMS:], a_scale, b_scale, None, None, torch.float32)
        rest = rest if residual is None else rest + residual
        a, b = a[:, :MOST_TERMS], b[:, :MOST_TERMS]
        return matmul(a, b, a_scale, b_scale, bias, rest, torch.float32).to(out_dtype)
    a, b = unit_stride(a), unit_stride(b)
    c = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    residual = None if residual is None else residual.contiguous()
    a_scale, b_scale, bias = a_scale.contiguous(), b_scale.contiguous(), None if bias is None else bias.contiguous()
    if c.numel() == 0:
        return c
    if a.shape[1] and _has_tma(a.device) and _takes_tma(a, b, c, residual):
        tile = hopper_tile(
            a.shape[1], int8=a.dtype is torch.int8, residual=residual is not None, out_bytes=c.element_size()
        )
        launch_tma(tile, a, b, c, a_scale, b_scale, bias, residual)
    else:
        launch_pointers(POINTER_TILE, a, b, c, a_scale, b_scale, bias, residual)
    return c


_has_tma = functools.cache(has_tma)  # asked for every product


def _constants(
    tile: Tile, a: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Any, residual: Any, **more: Any
) -> dict[str, Any]:
    return {
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP": tile.group,
        **more,
        "ACC": tl.int32 if a.dtype is torch.int8 else tl.float32,
        "A_PER_ROW": a_scale.numel() > 1,
        "B_PER_COLUMN": b_scale.numel() > 1,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
    }


def launch_tma(
    tile: Tile, a: Tensor, b: Tensor, c: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Any, residual: Any
) -> None:
    """The kernel for Hopper with a given tile; arguments as in `matmul`, the result goes to c."""
    (M, K), N = a.shape, b.shape[0]
    part = [tile.m, tile.n // tile.split]
    c_desc = TensorDescriptor.from_tensor(c, part)
    tiles = triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)
    launch(
        *(_matmul_tma, (min(tiles, tile.programs * multiprocessors(a.device)),)),
        TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(b, [tile.n, tile.k]),
        c_desc,
        c_desc if residual is None else TensorDescriptor.from_tensor(residual, part),
        *(a_scale, b_scale, a_scale if bias is None else bias, M, N, K),
        constants=_constants(tile, a, a_scale, b_scale, bias, residual, SPLIT=tile.split),
        warps=tile.warps,
        stages=tile.stages,
    )


def launch_pointers(
    tile: Tile, a: Tensor, b: Tensor, c: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Any, residual: Any
) -> None:
    """The kernel for other GPUs with a given tile; arguments as in `matmul`, the result goes to c."""
    (M, K), N = a.shape, b.shape[0]
    launch(
        *(_matmul_pointers, (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)),
        *(a, b, c, c if residual is None else residual, a_scale, b_scale, a_scale if bias is None else bias),
        *(M, N, K, a.stride(0), b.stride(0)),
        constants=_constants(tile, a, a_scale, b_scale, bias, residual),
        warps=tile.warps,
        stages=tile.stages,
    )


def matmul16(a: Tensor, b: Tensor) -> Tensor:
    """cuBLAS: nothing to gain from a kernel of our own."""
    return a @ b if a.dtype is torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
