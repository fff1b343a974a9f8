"""What the kernels should compute, in float64 and straight from the formulas; nothing of clipq is used."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 0.0}
"""Twice the largest relative error of a rounding."""


@functools.cache
def levels(dtype: torch.dtype) -> Tensor:
    """Every value that a low-precision type is allowed to take, ascending."""
    if dtype is torch.int8:
        return torch.arange(-127, 128, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()].unique()


def nearest(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The level next to each value; of two that are as near, either."""
    table = levels(dtype)
    above = torch.searchsorted(table, v.contiguous()).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    return torch.where(v - low <= high - v, low, high)


def absmax(x: Tensor, dim: int | None) -> Tensor:
    """Largest magnitudes, kept broadcastable: of each row (1), each column (0) or of everything (None)."""
    magnitudes = x.double().abs()
    if dim is None:
        return magnitudes.max().reshape(1, 1) if x.numel() else torch.zeros(1, 1, dtype=torch.float64)
    if x.shape[dim] == 0:
        return torch.zeros([1 if d == dim else n for d, n in enumerate(x.shape)], dtype=torch.float64)
    return magnitudes.amax(dim, keepdim=True)


def scaled(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """x divided by its scales."""
    amax = absmax(x, dim)
    return torch.where(amax > 0, x.double() * LARGEST[dtype] / amax.clamp(min=1e-300), 0.0)


def ties(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """How far a value may be off because it lies half way between two levels, within float32's rounding."""
    table, v = levels(dtype), scaled(x, dtype, dim)
    above = torch.searchsorted(table, v.contiguous()).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    tie = (v - (low + high) / 2).abs() <= 2e-6 * v.abs()
    return torch.where(tie, high - low, 0.0) * absmax(x, dim) / LARGEST[dtype]


def fake_quantize(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """x with the noise of quantization, float64."""
    return nearest(scaled(x, dtype, dim), dtype) * absmax(x, dim) / LARGEST[dtype]


def assert_quantized(x: Tensor, q: Tensor, scale: Tensor, dim: int | None) -> None:
    """q is the level nearest to x / scale, but for ties within float32's rounding; scale is exact but for that."""
    x, q, scale = x.cpu(), q.cpu(), scale.cpu()
    expected = absmax(x, dim) / LARGEST[q.dtype]
    torch.testing.assert_close(scale.double().flatten(), expected.flatten(), rtol=1e-6, atol=0)
    assert q.shape == x.shape
    v = scaled(x, q.dtype, dim)
    excess = (v - q.double()).abs() - (v - nearest(v, q.dtype)).abs() - 2e-6 * v.abs()
    assert not q.numel() or excess.max() <= 0, (
        f"off by {excess.max():.3g} at {divmod(int(excess.argmax()), x.shape[1])}"
    )


def assert_near(
    actual: Tensor, expected: Tensor, magnitude: Tensor, *, tolerance: float = 4e-6, slack: Tensor | float = 0.0
) -> None:
    """Equal but for `tolerance` of the sum of magnitudes that cancel in it, and the rounding to `actual`'s type."""
    assert actual.shape == expected.shape
    actual, expected, magnitude = actual.cpu(), expected.cpu(), magnitude.cpu()
    tiniest = 2.0**-24 if actual.dtype is torch.float16 else 1e-37
    allowed = tolerance * magnitude + EPS[actual.dtype] * expected.abs() + tiniest + slack
    share = (actual.double() - expected).abs() / allowed
    worst = share.max().item() if share.numel() else 0.0
    assert worst <= 1, f"error {worst:.3g} times what is allowed at {int(share.argmax())} of {tuple(share.shape)}"


def gelu(x: Tensor, quick: bool) -> Tensor:
    """Of a float64 tensor, differentiable."""
    return x * torch.sigmoid(1.702 * x) if quick else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Of float64 tensors, differentiable."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias
