"""Which of the three products of a linear layer runs in which precision, as data.

A linear layer has inputs X [b, n], weights W [m, n] and output gradients G [b, m], and three products in a training
step:

    output        Y  = X Wᵀ    inner dimension n
    input grad    dX = G W     inner dimension m
    weight grad   dW = Gᵀ X    inner dimension b: images × tokens, tens of thousands

A recipe says for each how its two operands are quantized, or leaves it in 16 bits. Source: Wortsman et al., "Stable
and low-precision training for large-scale vision-language models", https://arxiv.org/abs/2304.13013.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2


class Scales(Enum):
    """How many scales an operand has."""

    vector = "vector"
    """One for each slice that a sum runs over: a row of X and of W in Y = X Wᵀ, a column of G and of X in dW = Gᵀ X."""
    tensor = "tensor"
    """One for the whole matrix."""


class Saved(Enum):
    """What the forward keeps of X for the weight gradient."""

    input = "input"
    """X in 16 bits."""
    quantized = "quantized"
    """The quantized X, to be dequantized in the backward."""
    recomputed = "recomputed"
    """Nothing where X is the output of a norm or an activation: it is computed again in the backward. Elsewhere X."""


@dataclass(frozen=True)
class Operand:
    """How one matrix of a product is quantized."""

    dtype: torch.dtype
    scales: Scales


@dataclass(frozen=True)
class Product:
    """A product of two quantized matrices."""

    left: Operand
    right: Operand
    stochastic: bool = False
    """Round up or down at random, with the mean kept, in place of to the nearest (int8 only)."""


@dataclass(frozen=True)
class LinearRecipe:
    """A way to compute a linear layer. None for a product means 16 bits; output and grad_input go together."""

    name: str
    output: Product | None = None
    grad_input: Product | None = None
    grad_weight: Product | None = None
    saved: Saved = Saved.input
    simulated: bool = False
    """Round to values that the type represents, but multiply in the 16-bit type."""

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be computed."""
        products = {"output": self.output, "grad_input": self.grad_input, "grad_weight": self.grad_weight}
        if (self.output is None) != (self.grad_input is None) or (self.grad_weight and not self.output):
            raise ValueError(
                f"recipe {self.name}: output and grad_input go together, in low precision or in 16 bits, and "
                "grad_weight is in low precision only where they are"
            )
        for name, product in products.items():
            if product is None:
                continue
            types = {operand.dtype for operand in (product.left, product.right)}
            if not types <= {INT8, E4M3, E5M2}:
                raise ValueError(
                    f"recipe {self.name}: {name} multiplies {product.left.dtype} with {product.right.dtype}: expected "
                    f"operands of {INT8}, {E4M3} or {E5M2}; None is a product of 16 bits"
                )
            if (product.left.dtype is INT8) != (product.right.dtype is INT8):
                raise ValueError(
                    f"recipe {self.name}: {name} multiplies {product.left.dtype} with {product.right.dtype}: expected "
                    "both int8 or both fp8"
                )
            int8_vectors = all(o.dtype is INT8 and o.scales is Scales.vector for o in (product.left, product.right))
            if product.stochastic and not (name == "grad_weight" and int8_vectors):
                raise ValueError(f"recipe {self.name}: {name}: only a grad_weight of int8 with vectors is stochastic")

    def with_formats(self, *, forward: torch.dtype, grad: torch.dtype) -> LinearRecipe:
        """The same recipe with other fp8 types: `forward` for X and W, `grad` for G.

        Raises:
            ValueError: the recipe is not of fp8, or a type is not fp8.
        """
        if not self.is_fp8:
            raise ValueError(f"recipe {self.name} is not of fp8: its types cannot be changed")
        for dtype in (forward, grad):
            if dtype not in (E4M3, E5M2):
                raise ValueError(f"{dtype}: expected {E4M3} or {E5M2}")

        def change(product: Product | None, left: torch.dtype) -> Product | None:
            if product is None:
                return None
            return replace(product, left=replace(product.left, dtype=left), right=replace(product.right, dtype=forward))

        return replace(
            self,
            output=change(self.output, forward),
            grad_input=change(self.grad_input, grad),
            grad_weight=change(self.grad_weight, grad),
        )

    @property
    def is_fp8(self) -> bool:
        """Whether its products are of fp8, real or simulated."""
        return self.output is not None and self.output.left.dtype is not INT8

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Low-precision types that it multiplies in; empty where the products are simulated or all in 16 bits."""
        products = () if self.simulated else (self.output, self.grad_input, self.grad_weight)
        return {operand.dtype for p in products if p is not None for operand in (p.left, p.right)}

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """The type of the weight where both of its products take the same values of it, with one scale; else None."""
        if self.output is None or self.grad_input is None or self.output.right != self.grad_input.right:
            return None
        return self.output.right.dtype if self.output.right.scales is Scales.tensor else None

    @property
    def fusable(self) -> bool:
        """Whether the kernels that quantize in a norm or an activation serve it: rows quantized, dW in 16 bits."""
        return (
            not self.simulated
            and self.grad_weight is None
            and all(p is not None and p.left.scales is Scales.vector for p in (self.output, self.grad_input))
        )


def _product(left: torch.dtype, right: torch.dtype, left_scales: Scales, right_scales: Scales) -> Product:
    return Product(Operand(left, left_scales), Operand(right, right_scales))


_V, _T = Scales.vector, Scales.tensor
_SWITCHBACK = _product(INT8, INT8, _V, _T)
_ALL_VECTORS = _product(INT8, INT8, _V, _V)
_FP8 = (_product(E4M3, E4M3, _T, _T), _product(E5M2, E4M3, _T, _T), _product(E5M2, E4M3, _T, _T))
_SWITCHBACK_FP8 = (_product(E4M3, E4M3, _V, _T), _product(E5M2, E4M3, _V, _T))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        LinearRecipe("bf16"),
        LinearRecipe("llm_int8", output=_ALL_VECTORS, grad_input=_ALL_VECTORS, grad_weight=_ALL_VECTORS),
        LinearRecipe("switchback", output=_SWITCHBACK, grad_input=_SWITCHBACK),
        LinearRecipe("switchback_m", output=_SWITCHBACK, grad_input=_SWITCHBACK, saved=Saved.quantized),
        LinearRecipe("switchback_r", output=_SWITCHBACK, grad_input=_SWITCHBACK, saved=Saved.recomputed),
        LinearRecipe("switchback_q", output=_ALL_VECTORS, grad_input=_ALL_VECTORS),
        LinearRecipe("fp8_sim", *_FP8, simulated=True),
        LinearRecipe("switchback_fp8_sim", *_SWITCHBACK_FP8, simulated=True),
        LinearRecipe("fp8", *_FP8),
        LinearRecipe("switchback_fp8", *_SWITCHBACK_FP8),
        LinearRecipe(
            "int8_stochastic",
            output=_SWITCHBACK,
            grad_input=_SWITCHBACK,
            grad_weight=replace(_ALL_VECTORS, stochastic=True),
        ),
    )
}
"""Every recipe by name."""


def get_recipe(recipe: str | LinearRecipe) -> LinearRecipe:
    """A recipe by its name.

    Raises:
        ValueError: there is no recipe of this name; the message lists them.
    """
    if isinstance(recipe, LinearRecipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[recipe]
