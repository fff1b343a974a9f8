"""GELU, exact or quick, that also quantizes its output row by row, and its gradient with that of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from clipq.kernels.formats import check_dtype
from clipq.kernels.gelu import reference
from clipq.kernels.register import register

_TRITON = "clipq.kernels.gelu.triton"


def _fake_quantize(x: Tensor, quick: bool, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    y = x.new_empty((rows, cols) if keep else (0,))
    return y, x.new_empty((rows, cols), dtype=dtype), x.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    dy: Tensor, x: Tensor, quick: bool, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    scale, sums = (x.new_empty(n, dtype=torch.float32) for n in (rows, cols))
    y = x.new_empty((rows, cols) if keep else (0,))
    return x.new_empty((rows, cols)), x.new_empty((rows, cols), dtype=dtype), scale, sums, y


_quantize = register(
    "gelu_quantize",
    "(Tensor x, bool quick, ScalarType dtype, bool keep) -> (Tensor, Tensor, Tensor)",
    reference=reference.gelu_quantize,
    fake=_fake_quantize,
    module=_TRITON,
)
_backward = register(
    "gelu_backward_quantize",
    "(Tensor dy, Tensor x, bool quick, ScalarType dtype, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.gelu_backward_quantize,
    fake=_fake_backward,
    module=_TRITON,
)


def gelu_quantize(x: Tensor, *, quick: bool, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y = gelu(x) in float32, rounded to x's type, then quantized row by row.

    Args:
        x: [M, K] of any floating type.
        quick: x · sigmoid(1.702 x) in place of x · Φ(x) (Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415).
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        keep: return y too.

    Returns:
        y [M, K] of x's type (or [0] if not kept), q [M, K] of `dtype`, scale [M] float32.
    """
    check_dtype(dtype)
    return _quantize(x, quick, dtype, keep)


def gelu_backward_quantize(
    dy: Tensor, x: Tensor, *, quick: bool, dtype: torch.dtype, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx = dy · gelu'(x) rounded to x's type, and what the linear layer before needs of it.

    Args:
        dy, x: [M, K].
        keep: return y = gelu(x) too, the bits of `gelu_quantize`.

    Returns:
        dx [M, K] of x's type, q [M, K] of `dtype`, scale [M] float32, sums of the columns of dx [K] float32,
        y [M, K] of x's type (or [0] if not kept).
    """
    check_dtype(dtype)
    return _backward(dy, x, quick, dtype, keep)
