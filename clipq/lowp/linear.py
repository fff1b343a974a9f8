"""A linear layer whose products follow a recipe. Begin with `recipe.py`: the three products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipq import kernels
from clipq.lowp.products import (
    Quantized,
    QuantizedWeight,
    autocasts,
    compute_dtype,
    multiply,
    quantize,
    quantize_weight,
    weight_gradient,
)
from clipq.lowp.recipe import LinearRecipe, Saved, Scales, get_recipe


class _Linear(torch.autograd.Function):
    """Y = X Wᵀ + bias (+ residual)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_mn: Tensor,
        bias_m: Tensor | None,
        residual: Tensor | None,
        w_q: Tensor,
        w_scale: Tensor,
        w_qt: Tensor,
        w_qt_scale: Tensor,
        recipe: LinearRecipe,
        dtype: torch.dtype,
    ) -> Tensor:
        assert recipe.output is not None
        x_bn = x.flatten(0, -2).to(dtype)
        quantized = quantize(x_bn, recipe.output.left)
        saved = quantized if recipe.saved is Saved.quantized else (x_bn,)
        ctx.save_for_backward(w_qt, w_qt_scale, *(saved if ctx.needs_input_grad[1] else ()))
        ctx.recipe, ctx.dtype = recipe, dtype
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight_mn.dtype
        ctx.bias_dtype = None if bias_m is None else bias_m.dtype
        ctx.residual = residual is not None
        y_bm = multiply(
            quantized,
            Quantized(w_q, w_scale),
            bias=bias_m,
            residual=None if residual is None else residual.flatten(0, -2),
            out_dtype=dtype if residual is None else residual.dtype,
            simulated=recipe.simulated,
        )
        return unflatten(y_bm, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        recipe: LinearRecipe = ctx.recipe
        assert recipe.grad_input is not None
        w_qt, w_qt_scale, *saved = ctx.saved_tensors
        g_bm = grads[0].flatten(0, -2).to(ctx.dtype)
        dx = dw = db = sums_m = transposed = None
        if ctx.needs_input_grad[0]:
            if recipe.grad_input.left.scales is Scales.vector:
                q, scale, sums_m = kernels.quantize_rows(
                    g_bm, recipe.grad_input.left.dtype, column_sums=ctx.needs_input_grad[2]
                )
                g = Quantized(q, scale)
            else:
                q, qt, scale = kernels.quantize_tensor(g_bm, recipe.grad_input.left.dtype)
                g = Quantized(q, scale)
                if recipe.grad_weight and recipe.grad_weight.left == recipe.grad_input.left:
                    transposed = Quantized(qt, scale)
            dx_bn = multiply(g, Quantized(w_qt, w_qt_scale), out_dtype=ctx.x_dtype, simulated=recipe.simulated)
            dx = unflatten(dx_bn, grads[0])
        if ctx.needs_input_grad[1]:
            x_bn = dequantize(Quantized(*saved), ctx.dtype) if recipe.saved is Saved.quantized else saved[0]
            product, simulated = recipe.grad_weight, recipe.simulated
            dw = weight_gradient(g_bm, x_bn, product, simulated=simulated, left=transposed).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            db = (g_bm.float().sum(0) if sums_m is None else sums_m).to(ctx.bias_dtype)
        return dx, dw, db, grads[0] if ctx.residual else None, None, None, None, None, None, None


def unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """[b, m] -> the leading shape of `like`, then m; not a view to autograd, so that whoever gets it may change it."""
    return torch.ops.aten._unsafe_view(rows, (*like.shape[:-1], rows.shape[1]))


def dequantize(x: Quantized, dtype: torch.dtype) -> Tensor:
    """q · scale in a floating type."""
    return kernels.dequantize_rows(x.q, x.scale.expand(x.q.shape[0]), dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str | LinearRecipe,
    *,
    residual: Tensor | None = None,
    quantized: QuantizedWeight | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` with the products of a recipe.

    Args:
        x: [..., n] of the weight's type; under autocast of any floating type, and it is taken in autocast's.
        weight: [m, n], bias: [m].
        residual: [..., m], added to the output, whose type it then has.
        quantized: the weight, already quantized for this recipe.

    Returns:
        [..., m] of autocast's type, or of x's where autocast is off.

    Raises:
        TypeError: x is not of a real floating type, or, where autocast is off, not of the weight's.
        ValueError: unknown recipe, or one of 16 bits; x or the residual has another shape than the layer takes.
    """
    recipe = get_recipe(recipe)
    if not x.is_floating_point():
        raise TypeError(f"low-precision linear layer: input of {x.dtype}, expected a real floating type")
    dtype = compute_dtype(x)
    if dtype != weight.dtype and not autocasts(x):
        raise TypeError(f"low-precision linear layer: input of {x.dtype}, weight of {weight.dtype}, and no autocast")
    if x.ndim == 0 or recipe.output is None:
        raise ValueError(f"low-precision linear layer: input of shape {tuple(x.shape)}, recipe {recipe.name}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"low-precision linear layer: input of shape {tuple(x.shape)}, expected [..., {weight.shape[1]}], the "
            "layer's in_features"
        )
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(
            f"low-precision linear layer: residual of shape {tuple(residual.shape)}, expected "
            f"{(*x.shape[:-1], weight.shape[0])}"
        )
    w = quantize_weight(weight.detach(), recipe) if quantized is None else quantized
    if x.ndim == 1:
        residual = None if residual is None else residual[None]
        return linear(x[None], weight, bias, recipe, residual=residual, quantized=w)[0]
    return _Linear.apply(x, weight, bias, residual, *w, recipe, dtype)  # pyright: ignore[reportReturnType]


class LowpLinear(nn.Linear):
    """An `nn.Linear` that computes by a recipe; parameters and state dict are those of `nn.Linear`.

    `convert_linears` turns existing layers into it. To build one: `LowpLinear(n, m, recipe="switchback")`.

    Raises:
        ValueError: unknown recipe, or one of 16 bits.
    """

    recipe: LinearRecipe
    _held: QuantizedWeight | None
    """The weight as `quantized_once` holds it."""
    _holding: bool
    """Whether the next weight that is quantized is to be held."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, recipe: str | LinearRecipe, **kwargs: Any
    ):
        super().__init__(in_features, out_features, bias, **kwargs)
        self.recipe, self._held, self._holding = get_recipe(recipe), None, False
        if self.recipe.output is None:
            raise ValueError(f"LowpLinear: recipe {self.recipe.name} is of 16 bits: use nn.Linear")

    @staticmethod
    def from_linear(layer: nn.Linear, recipe: str | LinearRecipe) -> LowpLinear:
        """The layer itself, turned in place: its parameters, hooks and name stay, as under `fully_shard`."""
        layer.__class__ = LowpLinear
        converted: Any = layer
        converted.recipe, converted._held, converted._holding = get_recipe(recipe), None, False
        return converted

    def weights(self) -> tuple[Tensor, QuantizedWeight]:
        """The weight, and the same in low precision: held by `quantized_once`, or quantized now.

        Together, since a parametrized weight is computed each time that it is read, maybe at random.
        """
        weight = self.weight
        if self._held is not None:
            return weight, self._held
        quantized = quantize_weight(weight.detach(), self.recipe)
        if self._holding:
            self._held = quantized
        return weight, quantized

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], plus `residual` of that shape where given."""
        weight, quantized = self.weights()
        return linear(input, weight, self.bias, self.recipe, residual=residual, quantized=quantized)

    def __getstate__(self) -> dict[str, Any]:
        # a copy's weights go their own way: it does not hold what `quantized_once` holds for this one
        return super().__getstate__() | {"_held": None, "_holding": False}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"
