"""GELU in plain torch; signatures are those of the operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipq.kernels.quantize.reference import quantize_rows


def _gelu(x: Tensor, quick: bool) -> Tensor:
    v = x.float()
    return (v * torch.sigmoid(1.702 * v) if quick else torch.nn.functional.gelu(v)).to(x.dtype)


def gelu_quantize(x: Tensor, quick: bool, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = _gelu(x, quick)
    q, scale, _ = quantize_rows(y, dtype, False)
    return y if keep else y.new_empty(0), q, scale


def gelu_backward_quantize(
    dy: Tensor, x: Tensor, quick: bool, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v = x.float()
    if quick:
        s = torch.sigmoid(1.702 * v)
        slope = s * (1 + 1.702 * v * (1 - s))
    else:
        slope = 0.5 * (1 + torch.erf(v * 0.5**0.5)) + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    dx = (dy.float() * slope).to(x.dtype)
    q, scale, sums = quantize_rows(dx, dtype, True)
    return dx, q, scale, sums, _gelu(x, quick) if keep else x.new_empty(0)
