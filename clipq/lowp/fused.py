"""Linear layers fused with the norm or the activation that feeds them, and a residual block made of them.

The value that a norm or an activation hands to a linear layer is quantized where it is computed, and so is the gradient
that the activation hands back: no kernel reads these only to quantize them. A fused layer gives what its parts give one
after another, but for the order of float32 sums in the norm, and with fewer roundings to 16 bits: a residual is added
before the one of the output.

Shape suffixes: b rows (tokens), n inputs, m outputs, h hidden width of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipq import kernels
from clipq.lowp.linear import LowpLinear, dequantize, unflatten
from clipq.lowp.products import Quantized, compute_dtype, multiply, weight_gradient
from clipq.lowp.recipe import LinearRecipe, Saved


class _NormProjections(torch.autograd.Function):
    """X -> (Q, K, V, X), where [Q, K, V] = linear(layer_norm(X)).

    The three come out one by one, and so do their gradients come in: they are put together where they are quantized.
    X is handed through so that both its gradients meet in one kernel.
    """

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
    ) -> tuple[Tensor, ...]:
        forward, _ = _types(recipe)
        x_bn = x.flatten(0, -2)
        y_bn, q, scale, mean, rstd = kernels.layer_norm_quantize(
            x_bn,
            norm_weight_n,
            norm_bias_n,
            eps,
            out_dtype=dtype,
            dtype=forward,
            keep=_saves(ctx, 4, recipe) is Saved.input,
        )
        out_bm = multiply(Quantized(q, scale), Quantized(w_q, w_scale), bias=bias_m, out_dtype=dtype, simulated=False)
        kept = _to_keep(_saves(ctx, 4, recipe), y_bn, q, scale)
        ctx.save_for_backward(x_bn, norm_weight_n, norm_bias_n, mean, rstd, w_qt, w_qt_scale, *kept)
        ctx.recipe, ctx.dtype = recipe, dtype
        ctx.weight_dtype, ctx.norm_dtype = weight_mn.dtype, norm_weight_n.dtype
        ctx.bias_dtype = None if bias_m is None else bias_m.dtype
        return *unflatten(out_bm, x).chunk(3, -1), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors  # read once: checkpointing computes them anew at each reading
        x_bn, *norm, w_qt, w_qt_scale = saved[:7]
        residual_bn = grads[3].flatten(0, -2)
        _, backward = _types(ctx.recipe)
        g_bm, q, scale, sums_m = kernels.pack_quantize_rows(
            *(g.flatten(0, -2).to(ctx.dtype) for g in grads[:3]), dtype=backward
        )
        dy_bn = multiply(Quantized(q, scale), Quantized(w_qt, w_qt_scale), out_dtype=ctx.dtype, simulated=False)
        dx, *dnorm, y_bn = _norm_backward(ctx, dy_bn, x_bn, norm, residual_bn)
        dw = _weight_gradient(ctx, 4, g_bm, saved[7:] or (y_bn,))
        db = None if ctx.bias_dtype is None else sums_m.to(ctx.bias_dtype)
        return unflatten(dx, grads[3]), *dnorm, None, dw, db, *(None,) * 6


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
        fc_saves, proj_saves = _saves(ctx, 4, recipe), _saves(ctx, 10, recipe)
        x_bn = x.flatten(0, -2)
        y_bn, y_q, y_scale, mean, rstd = kernels.layer_norm_quantize(
            x_bn, norm_weight_n, norm_bias_n, eps, out_dtype=dtype, dtype=forward, keep=fc_saves is Saved.input
        )
        h_bh = multiply(
            Quantized(y_q, y_scale), Quantized(fc_q, fc_scale), bias=bias_h, out_dtype=dtype, simulated=False
        )
        a_bh, a_q, a_scale = kernels.gelu_quantize(h_bh, quick=quick, dtype=forward, keep=proj_saves is Saved.input)
        out_bn = multiply(
            Quantized(a_q, a_scale),
            Quantized(proj_q, proj_scale),
            bias=bias_n,
            residual=x_bn if add else None,
            out_dtype=x_bn.dtype if add else dtype,
            simulated=False,
        )
        kept_y, kept_a = _to_keep(fc_saves, y_bn, y_q, y_scale), _to_keep(proj_saves, a_bh, a_q, a_scale)
        layers = (fc_qt, fc_qt_scale, proj_qt, proj_qt_scale)
        ctx.save_for_backward(x_bn, norm_weight_n, norm_bias_n, mean, rstd, h_bh, *layers, *kept_y, *kept_a)
        ctx.cut = 10 + len(kept_y)
        ctx.recipe, ctx.dtype, ctx.quick, ctx.add = recipe, dtype, quick, add
        ctx.weight_dtype, ctx.norm_dtype = weight_hn.dtype, norm_weight_n.dtype
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (bias_h, bias_n)]
        out = unflatten(out_bn, x)
        return out if add else (out, x.view_as(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        x_bn, *norm, h_bh, fc_qt, fc_qt_scale, proj_qt, proj_qt_scale = saved[:10]
        residual_bn = (grads[0] if ctx.add else grads[1]).flatten(0, -2)
        g_bn = grads[0].flatten(0, -2).to(ctx.dtype)
        _, backward = _types(ctx.recipe)

        q, scale, sums_n = kernels.quantize_rows(g_bn, backward, column_sums=True)
        da_bh = multiply(Quantized(q, scale), Quantized(proj_qt, proj_qt_scale), out_dtype=ctx.dtype, simulated=False)
        dh_bh, q, scale, sums_h, a_bh = kernels.gelu_backward_quantize(
            da_bh, h_bh, quick=ctx.quick, dtype=backward, keep=_saves(ctx, 10, ctx.recipe) is Saved.recomputed
        )
        dw_nh = _weight_gradient(ctx, 10, g_bn, saved[ctx.cut :] or (a_bh,))
        dy_bn = multiply(Quantized(q, scale), Quantized(fc_qt, fc_qt_scale), out_dtype=ctx.dtype, simulated=False)
        dx, *dnorm, y_bn = _norm_backward(ctx, dy_bn, x_bn, norm, residual_bn)
        dw_hn = _weight_gradient(ctx, 4, dh_bh, saved[10 : ctx.cut] or (y_bn,))
        db_h, db_n = (
            None if dtype is None else sums.to(dtype)
            for dtype, sums in zip(ctx.bias_dtypes, (sums_h, sums_n), strict=True)
        )
        return unflatten(dx, grads[0]), *dnorm, None, dw_hn, db_h, *(None,) * 4, dw_nh, db_n, *(None,) * 8


def _saves(ctx: Any, place: int, recipe: LinearRecipe) -> Saved | None:
    """How the weight at this place among the arguments gets its input back; None where it is frozen."""
    return recipe.saved if ctx.needs_input_grad[place] else None


def _to_keep(saves: Saved | None, x_bn: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (x_bn,) if saves is Saved.input else (q, scale) if saves is Saved.quantized else ()


def _weight_gradient(ctx: Any, place: int, g_bm: Tensor, x: tuple[Tensor, ...]) -> Tensor | None:
    """Gradient of the weight at this place, from its input as kept or recomputed; None where it is frozen."""
    if not ctx.needs_input_grad[place]:
        return None
    x_bn = dequantize(Quantized(*x), ctx.dtype) if len(x) == 2 else x[0]
    return weight_gradient(g_bm, x_bn, None, simulated=False).to(ctx.weight_dtype)


def _types(recipe: LinearRecipe) -> tuple[torch.dtype, torch.dtype]:
    """Low-precision types of activations and of gradients."""
    assert recipe.output is not None
    assert recipe.grad_input is not None
    return recipe.output.left.dtype, recipe.grad_input.left.dtype


def _norm_backward(
    ctx: Any, dy_bn: Tensor, x_bn: Tensor, norm: list[Tensor], residual_bn: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of X and of the norm's weight and bias, and the norm's output where it is recomputed.

    Args:
        norm: weight, bias, mean, reciprocal of the standard deviation.
    """
    weight_n, bias_n, mean, rstd = norm
    recomputed = _saves(ctx, 4, ctx.recipe) is Saved.recomputed
    dx, dweight, dbias, y_bn = kernels.layer_norm_backward(
        dy_bn, x_bn, weight_n, mean, rstd, residual_bn, bias=bias_n if recomputed else None
    )
    return dx, dweight.to(ctx.norm_dtype), dbias.to(ctx.norm_dtype), y_bn


def norm_projections(x: Tensor, norm: nn.LayerNorm, layer: LowpLinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(*layer(norm(x)).chunk(3, -1), x): [..., n] -> three of [..., m / 3] and x again, to be used in place of x."""
    weight, quantized = layer.weights()
    return _NormProjections.apply(  # pyright: ignore[reportReturnType]
        *(x, norm.weight, norm.bias, norm.eps, weight, layer.bias),
        *(*quantized, layer.recipe, compute_dtype(x)),
    )


def norm_mlp(
    x: Tensor, norm: nn.LayerNorm, fc: LowpLinear, proj: LowpLinear, *, quick: bool, add: bool
) -> tuple[Tensor, Tensor] | Tensor:
    """x + proj(gelu(fc(norm(x)))) where `add`; else the branch alone and x again, to be used in place of x."""
    (fc_weight, fc_quantized), (proj_weight, proj_quantized) = fc.weights(), proj.weights()
    return _NormMlp.apply(  # pyright: ignore[reportReturnType]
        *(x, norm.weight, norm.bias, norm.eps),
        *(fc_weight, fc.bias, *fc_quantized),
        *(proj_weight, proj.bias, *proj_quantized),
        *(quick, add, fc.recipe, compute_dtype(x)),
    )
