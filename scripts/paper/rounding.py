"""Operands of a weight gradient as they come out of quantization, and the variance that their errors should have.

Shapes: b rows (images × tokens), c columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipq.kernels.formats import QMAX, TINY
from clipq.kernels.quantize import reference
from clipq.lowp.recipe import E4M3, E5M2, INT8, Operand, Scales


class Kind(NamedTuple):
    """How the two operands of dW = Gᵀ X are quantized."""

    g: Operand
    x: Operand


KINDS = {
    "int8, a scale a column": Kind(Operand(INT8, Scales.vector), Operand(INT8, Scales.vector)),
    "int8, one scale": Kind(Operand(INT8, Scales.tensor), Operand(INT8, Scales.tensor)),
    "fp8, a scale a column": Kind(Operand(E5M2, Scales.vector), Operand(E4M3, Scales.vector)),
    "fp8, one scale": Kind(Operand(E5M2, Scales.tensor), Operand(E4M3, Scales.tensor)),
}
"""Of fp8 G is E5M2 and X is E4M3."""


class Rounded(NamedTuple):
    """A quantized matrix [b, c]."""

    values: Tensor
    """What it stands for, float64."""
    variances: Tensor
    """What the variance of each value's error is derived to be, float64: of steps and values, not of errors."""


def largest(x_bc: Tensor, row_max_b: Tensor, operand: Operand) -> Tensor:
    """Largest magnitudes [c] that decide the scales.

    Args:
        row_max_b: largest magnitude of each row over all columns of the matrix, of which x has some.
    """
    if operand.scales is Scales.vector:
        return x_bc.abs().amax(0)
    return row_max_b.amax().expand(x_bc.shape[1])


class Place(NamedTuple):
    """Where numbers lie among the values of a type; all exact."""

    inner: Tensor
    """The value on the side of zero, or the number itself."""
    step: Tensor
    """From there to the next value away from zero: that much larger in magnitude."""
    way: Tensor
    """The share of the step at which the number lies, in [0, 1)."""


def place(v: Tensor, dtype: torch.dtype) -> Place:
    """Of float32 numbers that are scaled to the range of the type."""
    if dtype is INT8:
        step = torch.ones_like(v)
    else:
        info = torch.finfo(dtype)
        # the power of two of a float32 is its bits without those of sign and mantissa
        power = (v.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = power.clamp(min=info.smallest_normal) * info.eps
    at = v.abs() / step
    whole = at.floor()
    return Place((whole * step).copysign(v), step, at - whole)


def rounded(x_bc: Tensor, amax_c: Tensor, dtype: torch.dtype, seed: Tensor | None) -> Rounded:
    """Quantizes columns with scales by `amax_c`, which is no less than any magnitude of its column.

    int8 and all rounding to nearest are clipq's quantizer's, to which a row of these magnitudes is added: it then
    chooses the scales that it would for more rows and columns. It has no stochastic fp8: that is done here, to one of
    the two neighbours with the mean kept, by draws as of int8's.

    Args:
        x_bc: float32.
        seed: [] int64 for stochastic rounding; None for rounding to nearest.
    """
    v = (x_bc * torch.where(amax_c > TINY, QMAX[dtype] / amax_c, 0.0)).clamp(-QMAX[dtype], QMAX[dtype])
    at, scale = place(v, dtype), amax_c.double() / QMAX[dtype]
    if seed is not None and dtype is not INT8:
        outwards = reference.uniform(seed, *v.shape) < at.way
        q = at.inner + torch.where(outwards, at.step.copysign(v), 0.0)
    else:
        q = reference.quantize_columns(torch.cat((x_bc, amax_c[None])), dtype, seed)[0].T[:-1]
    # a zero is represented exactly, whatever the step
    share = torch.where(v == 0, 0.0, 1 / 12) if seed is None else at.way * (1 - at.way)
    return Rounded(q.double() * scale, (at.step.square() * share).double() * scale.square())
