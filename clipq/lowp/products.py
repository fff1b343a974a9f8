"""The pieces of which low-precision layers are made: quantized operands, and the product of two of them.

Shape suffixes: b rows (tokens), n inputs, m outputs of a linear layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipq import kernels
from clipq.lowp.recipe import LinearRecipe, Operand, Product, Scales


class Quantized(NamedTuple):
    """A matrix as q · scale."""

    q: Tensor
    scale: Tensor
    """[] or one for each row of q, float32."""


class QuantizedWeight(NamedTuple):
    """A weight W [m, n], quantized for the two products that it enters."""

    q: Tensor
    """[m, n], for Y = X Wᵀ."""
    scale: Tensor
    """[m] or []."""
    qt: Tensor
    """[n, m], for dX = G W, whose sum runs over m."""
    qt_scale: Tensor
    """[n] or [1]."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a linear layer computes in: autocast's where it is on, else that of its input."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def autocasts(x: Tensor) -> bool:
    """Whether autocast changes the type of x: it leaves float64 alone, and knows nothing of meta tensors."""
    return x.device.type != "meta" and x.dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type)


def quantize(x_bn: Tensor, operand: Operand) -> Quantized:
    """An operand of a product whose sum runs over the columns of x."""
    if operand.scales is Scales.tensor:
        q, _, scale = kernels.quantize_tensor(x_bn, operand.dtype)
    else:
        q, scale, _ = kernels.quantize_rows(x_bn, operand.dtype)
    return Quantized(q, scale)


def quantize_transposed(x_bn: Tensor, operand: Operand, *, stochastic: bool = False) -> Quantized:
    """xᵀ [n, b] as an operand of a product whose sum runs over the rows of x."""
    if operand.scales is Scales.tensor:
        _, qt, scale = kernels.quantize_tensor(x_bn, operand.dtype)
        return Quantized(qt, scale)
    seed = torch.randint(2**31, (), device=x_bn.device) if stochastic else None
    return Quantized(*kernels.quantize_columns(x_bn, operand.dtype, seed=seed))


def quantize_weight(weight_mn: Tensor, recipe: LinearRecipe) -> QuantizedWeight:
    """Quantizes a weight as the output and the input gradient of a recipe want it."""
    assert recipe.output is not None
    assert recipe.grad_input is not None
    if recipe.weight_dtype is not None:
        q, qt, scale = kernels.quantize_tensor(weight_mn, recipe.weight_dtype)
        # a view, since torch.compile lets no tensor enter an autograd function twice
        return QuantizedWeight(q, scale, qt, scale.view(1))
    forward, backward = recipe.output.right, recipe.grad_input.right
    return QuantizedWeight(*quantize(weight_mn, forward), *quantize_transposed(weight_mn, backward))


def multiply(
    left: Quantized,
    right: Quantized,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
    simulated: bool,
) -> Tensor:
    """left rightᵀ + bias + residual: [b, n] and [m, n] -> [b, m] of `out_dtype`."""
    if not simulated:
        return kernels.matmul(
            left.q, right.q, left.scale, right.scale, bias=bias, residual=residual, out_dtype=out_dtype
        )
    # fp8 values are exact in bfloat16
    sums = kernels.matmul16(left.q.to(torch.bfloat16), right.q.to(torch.bfloat16).T)
    out = sums * left.scale.reshape(-1, 1) * right.scale
    out = out if bias is None else out + bias.float()
    return (out if residual is None else out + residual.float()).to(out_dtype)


def weight_gradient(
    g_bm: Tensor, x_bn: Tensor, product: Product | None, *, simulated: bool, left: Quantized | None = None
) -> Tensor:
    """dW = Gᵀ X, [m, n] float32: in 16 bits, or in low precision where the recipe says so; `left` is Gᵀ where it is
    quantized already."""
    if product is None:
        return kernels.matmul16(g_bm.T, x_bn)
    left = left or quantize_transposed(g_bm, product.left, stochastic=product.stochastic)
    right = quantize_transposed(x_bn, product.right, stochastic=product.stochastic)
    return multiply(left, right, out_dtype=torch.float32, simulated=simulated)
