"""Linear layers fused with the norm or the activation that feeds them, and a residual block made of them.

The value that a norm or an activation hands to a linear layer is quantized where it is computed, and so is the gradient
that the activation hands back: no kernel reads these only to quantize them. A fused layer gives what its parts give one
after another, but for the order of float32 sums in the norm.

Shape suffixes: b rows (tokens), n inputs, m outputs, h hidden width of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipq import kernels
from clipq.lowp.linear import LowpLinear, dequantize, unflatten
from clipq.lowp.products import Quantized, compute_dtype, multiply, weight_gradient
from clipq.lowp.recipe import LinearRecipe, Saved


class _NormLinear(torch.autograd.Function):
    """X -> (linear(layer_norm(X)), X). X is handed through so that both its gradients meet in one kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight_n: Tensor,
        norm_bias_n: Tensor,
        eps: float,
        weight_mn: Tensor,
        bias_m: Tensor | None,
        w_q: Tensor,
        w_scale: Tensor,
        w_qt: Tensor,
        w_qt_scale: Tensor,
        recipe: LinearRecipe,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        forward, _ = _types(recipe)
        x_bn = x.flatten(0, -2)
        y_bn, q, scale, mean, rstd = kernels.layer_norm_quantize(
            x_bn, norm_weight_n, norm_bias_n, eps, out_dtype=dtype, dtype=forward, keep=recipe.saved is Saved.input
        )
        out_bm = multiply(Quantized(q, scale), Quantized(w_q, w_scale), bias=bias_m, out_dtype=dtype, simulated=False)
        kept = {Saved.input: (y_bn,), Saved.quantized: (q, scale), Saved.recomputed: ()}[recipe.saved]
        ctx.save_for_backward(x_bn, norm_weight_n, norm_bias_n, mean, rstd, w_qt, w_qt_scale, *kept)
        ctx.recipe, ctx.dtype, ctx.eps = recipe, dtype, eps
        ctx.weight_dtype, ctx.norm_dtype = weight_mn.dtype, norm_weight_n.dtype
        ctx.bias_dtype = None if bias_m is None else bias_m.dtype
        return unflatten(out_bm, x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_bn, norm_weight_n, norm_bias_n, mean, rstd, w_qt, w_qt_scale, *kept = ctx.saved_tensors
        g_bm, residual_bn = grads[0].flatten(0, -2).to(ctx.dtype), grads[1].flatten(0, -2)
        _, backward = _types(ctx.recipe)
        q, scale, sums_m = kernels.quantize_rows(g_bm, backward, column_sums=True)
        dy_bn = multiply(Quantized(q, scale), Quantized(w_qt, w_qt_scale), out_dtype=ctx.dtype, simulated=False)
        y_bn = _norm_output(ctx, x_bn, norm_weight_n, norm_bias_n, kept)
        dw = weight_gradient(g_bm, y_bn, None, simulated=False).to(ctx.weight_dtype)
        dx, dnorm_weight, dnorm_bias = kernels.layer_norm_backward(dy_bn, x_bn, norm_weight_n, mean, rstd, residual_bn)
        db = None if ctx.bias_dtype is None else sums_m.to(ctx.bias_dtype)
        norm = (dnorm_weight.to(ctx.norm_dtype), dnorm_bias.to(ctx.norm_dtype), None)
        return unflatten(dx, grads[1]), *norm, dw, db, None, None, None, None, None, None


class _NormMlp(torch.autograd.Function):
    """X -> X + mlp(layer_norm(X)), or where `add` is off (mlp(layer_norm(X)), X)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight_n: Tensor,
        norm_bias_n: Tensor,
        eps: float,
        weight_hn: Tensor,
        bias_h: Tensor | None,
        fc_q: Tensor,
        fc_scale: Tensor,
        fc_qt: Tensor,
        fc_qt_scale: Tensor,
        weight_nh: Tensor,
        bias_n: Tensor | None,
        proj_q: Tensor,
        proj_scale: Tensor,
        proj_qt: Tensor,
        proj_qt_scale: Tensor,
        quick: bool,
        add: bool,
        recipe: LinearRecipe,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor] | Tensor:
        forward, _ = _types(recipe)
        keep = recipe.saved is Saved.input
        x_bn = x.flatten(0, -2)
        y_bn, y_q, y_scale, mean, rstd = kernels.layer_norm_quantize(
            x_bn, norm_weight_n, norm_bias_n, eps, out_dtype=dtype, dtype=forward, keep=keep
        )
        h_bh = multiply(
            Quantized(y_q, y_scale), Quantized(fc_q, fc_scale), bias=bias_h, out_dtype=dtype, simulated=False
        )
        a_bh, a_q, a_scale = kernels.gelu_quantize(h_bh, quick=quick, dtype=forward, keep=keep)
        out_bn = multiply(
            Quantized(a_q, a_scale),
            Quantized(proj_q, proj_scale),
            bias=bias_n,
            residual=x_bn if add else None,
            out_dtype=x_bn.dtype if add else dtype,
            simulated=False,
        )
        kept = {
            Saved.input: (y_bn, a_bh),
            Saved.quantized: (y_q, y_scale, a_q, a_scale),
            Saved.recomputed: (),
        }[recipe.saved]
        layers = (fc_qt, fc_qt_scale, proj_qt, proj_qt_scale)
        ctx.save_for_backward(x_bn, norm_weight_n, norm_bias_n, mean, rstd, h_bh, *layers, *kept)
        ctx.recipe, ctx.dtype, ctx.eps, ctx.quick, ctx.add = recipe, dtype, eps, quick, add
        ctx.weight_dtype, ctx.norm_dtype = weight_hn.dtype, norm_weight_n.dtype
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (bias_h, bias_n)]
        out = unflatten(out_bn, x)
        return out if add else (out, x.view_as(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_bn, norm_weight_n, norm_bias_n, mean, rstd, h_bh, fc_qt, fc_qt_scale, *rest = ctx.saved_tensors
        proj_qt, proj_qt_scale, *kept = rest
        half = len(kept) // 2
        residual_bn = (grads[0] if ctx.add else grads[1]).flatten(0, -2)
        g_bn = grads[0].flatten(0, -2).to(ctx.dtype)
        _, backward = _types(ctx.recipe)

        q, scale, sums_n = kernels.quantize_rows(g_bn, backward, column_sums=True)
        da_bh = multiply(Quantized(q, scale), Quantized(proj_qt, proj_qt_scale), out_dtype=ctx.dtype, simulated=False)
        dh_bh, q, scale, sums_h = kernels.gelu_backward_quantize(da_bh, h_bh, quick=ctx.quick, dtype=backward)
        a_bh = _activation_output(ctx, h_bh, kept[half:])
        dw_nh = weight_gradient(g_bn, a_bh, None, simulated=False).to(ctx.weight_dtype)
        dy_bn = multiply(Quantized(q, scale), Quantized(fc_qt, fc_qt_scale), out_dtype=ctx.dtype, simulated=False)
        y_bn = _norm_output(ctx, x_bn, norm_weight_n, norm_bias_n, kept[:half])
        dw_hn = weight_gradient(dh_bh, y_bn, None, simulated=False).to(ctx.weight_dtype)
        dx, dnorm_weight, dnorm_bias = kernels.layer_norm_backward(dy_bn, x_bn, norm_weight_n, mean, rstd, residual_bn)
        db_h, db_n = (
            None if dtype is None else sums.to(dtype)
            for dtype, sums in zip(ctx.bias_dtypes, (sums_h, sums_n), strict=True)
        )
        norm = (dnorm_weight.to(ctx.norm_dtype), dnorm_bias.to(ctx.norm_dtype), None)
        return unflatten(dx, grads[0]), *norm, dw_hn, db_h, *(None,) * 4, dw_nh, db_n, *(None,) * 8


def _types(recipe: LinearRecipe) -> tuple[torch.dtype, torch.dtype]:
    """Low-precision types of activations and of gradients."""
    assert recipe.output is not None
    assert recipe.grad_input is not None
    return recipe.output.left.dtype, recipe.grad_input.left.dtype


def _norm_output(ctx: Any, x_bn: Tensor, weight_n: Tensor, bias_n: Tensor, kept: list[Tensor]) -> Tensor:
    """The norm's output in 16 bits, from whatever the forward kept of it."""
    if ctx.recipe.saved is Saved.input:
        return kept[0]
    if ctx.recipe.saved is Saved.quantized:
        return dequantize(Quantized(*kept), ctx.dtype)
    forward, _ = _types(ctx.recipe)
    return kernels.layer_norm_quantize(x_bn, weight_n, bias_n, ctx.eps, out_dtype=ctx.dtype, dtype=forward, keep=True)[
        0
    ]


def _activation_output(ctx: Any, h_bh: Tensor, kept: list[Tensor]) -> Tensor:
    """The activation's output in 16 bits, from whatever the forward kept of it."""
    if ctx.recipe.saved is Saved.input:
        return kept[0]
    if ctx.recipe.saved is Saved.quantized:
        return dequantize(Quantized(*kept), ctx.dtype)
    forward, _ = _types(ctx.recipe)
    return kernels.gelu_quantize(h_bh, quick=ctx.quick, dtype=forward, keep=True)[0]


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: LowpLinear) -> tuple[Tensor, Tensor]:
    """(layer(norm(x)), x): [..., n] -> [..., m] and x again, to be used in place of x from here on."""
    return _NormLinear.apply(  # pyright: ignore[reportReturnType]
        *(x, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias),
        *(*layer.quantized_weight(), layer.recipe, compute_dtype(x)),
    )


def norm_mlp(
    x: Tensor, norm: nn.LayerNorm, fc: LowpLinear, proj: LowpLinear, *, quick: bool, add: bool
) -> tuple[Tensor, Tensor] | Tensor:
    """x + proj(gelu(fc(norm(x)))) where `add`; else the branch alone and x again, to be used in place of x."""
    return _NormMlp.apply(  # pyright: ignore[reportReturnType]
        *(x, norm.weight, norm.bias, norm.eps),
        *(fc.weight, fc.bias, *fc.quantized_weight()),
        *(proj.weight, proj.bias, *proj.quantized_weight()),
        *(quick, add, fc.recipe, compute_dtype(x)),
    )
