"""The linear layers of the paper in float64, written from its section 2 and its appendix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.emulation import fake_quantize, ties

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
ROW, COLUMN, TENSOR = 1, 0, None


class Layer(NamedTuple):
    """How each of X, W and G is quantized for each product; None for 16 bits."""

    x: tuple
    w_output: tuple
    g: tuple
    w_input: tuple
    weight: tuple | None = None
    """G and X of the weight gradient."""
    saved: str = "x"


_INT8 = {"x": (INT8, ROW), "g": (INT8, ROW)}
_TENSOR = {"w_output": (INT8, TENSOR), "w_input": (INT8, TENSOR)}
_VECTOR = {"w_output": (INT8, ROW), "w_input": (INT8, COLUMN)}
_FP8_W = {"w_output": (E4M3, TENSOR), "w_input": (E4M3, TENSOR)}
_FP8 = Layer(x=(E4M3, TENSOR), g=(E5M2, TENSOR), weight=((E5M2, TENSOR), (E4M3, TENSOR)), **_FP8_W)
_SWITCHBACK_FP8 = Layer(x=(E4M3, ROW), g=(E5M2, ROW), **_FP8_W)

LAYERS = {
    "llm_int8": Layer(**_INT8, **_VECTOR, weight=((INT8, COLUMN), (INT8, COLUMN))),
    "switchback": Layer(**_INT8, **_TENSOR),
    "switchback_m": Layer(**_INT8, **_TENSOR, saved="quantized"),
    "switchback_r": Layer(**_INT8, **_TENSOR),
    "switchback_q": Layer(**_INT8, **_VECTOR),
    "fp8_sim": _FP8,
    "fp8": _FP8,
    "switchback_fp8_sim": _SWITCHBACK_FP8,
    "switchback_fp8": _SWITCHBACK_FP8,
}
"""Every recipe but bf16 and the one with random rounding."""


class Emulated(NamedTuple):
    """A tensor, the sum of the magnitudes that each element is a sum of, and how far ties may move it."""

    value: Tensor
    magnitude: Tensor
    slack: Tensor


def operand(x: Tensor, how: tuple | None) -> tuple[Tensor, Tensor]:
    """A matrix as it enters a product, and how far ties may move its elements."""
    return (x, torch.zeros_like(x)) if how is None else (fake_quantize(x, *how), ties(x, *how))


def product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Emulated:
    (a, a_ties), (b, b_ties) = left, right
    add = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    return Emulated(a @ b + add, a.abs() @ b.abs() + add.abs(), 1.01 * (a_ties @ b.abs() + (a.abs() + a_ties) @ b_ties))


def emulate(
    layer: Layer, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, dtype: torch.dtype
) -> tuple[Emulated, Emulated, Emulated, Emulated]:
    """Y, dX, dW and db of matrices; X and G are rounded to the 16-bit type (or float32) first."""
    x, g, w = x.to(dtype).double(), g.to(dtype).double(), w.detach().double()
    b = None if b is None else b.detach()

    def transposed(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].T, pair[1].T

    x_q = operand(x, layer.x)
    y = product(x_q, transposed(operand(w, layer.w_output)), b)
    dx = product(operand(g, layer.g), operand(w, layer.w_input))
    kept = (x_q[0].to(dtype).double(), x_q[1]) if layer.saved == "quantized" else operand(x, None)
    pair = (operand(g, None), kept) if layer.weight is None else map(operand, (g, x), layer.weight)
    g_kept, x_kept = pair
    dw = product(transposed(g_kept), x_kept)
    return y, dx, dw, Emulated(g.sum(0), g.abs().sum(0), torch.zeros(g.shape[1]))


def snr(actual: Tensor, exact: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    exact = exact.double()
    return 20 * (exact.norm() / (actual.double() - exact).norm()).log10().item()
