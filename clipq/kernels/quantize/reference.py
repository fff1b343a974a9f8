"""Quantization in plain torch; signatures are those of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from clipq.kernels.formats import QMAX, TINY, empty_transposed


def _inverse(amax: Tensor, qmax: float) -> Tensor:
    return torch.where(amax > TINY, qmax / amax, 0.0)


def _encode(v: Tensor, dtype: torch.dtype) -> Tensor:
    # the values of a slice that is not finite do not matter, its scale says so; but their conversion must be defined
    v = torch.nan_to_num(v, nan=0.0)
    return v.round().to(dtype) if dtype is torch.int8 else v.clamp(-QMAX[dtype], QMAX[dtype]).to(dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype, column_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float()
    amax = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    q = _encode(x * _inverse(amax, QMAX[dtype])[:, None], dtype)
    return q, amax / QMAX[dtype], x.sum(0) if column_sums else x.new_empty(0)


def pack_quantize_rows(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = torch.cat((a, b, c), dim=1)
    return packed, *quantize_rows(packed, dtype, True)


def quantize_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float()
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    q = _encode(x * _inverse(amax, QMAX[dtype]), dtype)
    return q, _aligned_transpose(q), amax / QMAX[dtype]


def quantize_columns(x: Tensor, dtype: torch.dtype, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.float()
    amax = x.abs().amax(0) if x.shape[0] else x.new_zeros(x.shape[1])
    v = x * _inverse(amax, QMAX[dtype])
    if seed is not None:
        v = (v + uniform(seed, x.shape[0], x.shape[1])).floor().clamp(-127, 127)
    return _aligned_transpose(_encode(v, dtype)), amax / QMAX[dtype]


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (q.float() * scale[:, None]).to(dtype)


def uniform(seed: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, cols] in [0, 1) that is a function of seed and position: the hash "lowbias32" (Wellons 2018)."""
    mask = 0xFFFFFFFF
    at = torch.arange(rows * cols, device=seed.device).view(rows, cols)
    x = (at + seed) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    x = x ^ (x >> 16)
    return (x >> 8).float() * 2.0**-24


def _aligned_transpose(q: Tensor) -> Tensor:
    return empty_transposed(q, q.dtype).copy_(q.T)
