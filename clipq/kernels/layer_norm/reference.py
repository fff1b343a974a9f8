"""Layer norm in plain torch; signatures are those of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from clipq.kernels.quantize.reference import quantize_rows


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = x.float()
    mean = x.mean(1)
    centred = x - mean[:, None]
    rstd = (centred.square().mean(1) + eps).rsqrt()
    y = (centred * rstd[:, None] * weight.float() + bias.float()).to(out_dtype)
    q, scale, _ = quantize_rows(y, dtype, False)
    return y if keep else y.new_empty(0), q, scale, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed = (x.float() - mean[:, None]) * rstd[:, None]
    y = dy.new_empty(0) if bias is None else (normed * weight.float() + bias.float()).to(dy.dtype)
    dy = dy.float()
    g = dy * weight.float()
    dx = (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True)) * rstd[:, None]
    if residual is not None:
        dx = dx + residual.float()
    return dx.to(x.dtype), (dy * normed).sum(0), dy.sum(0), y
