"""Layer norm that also quantizes its output row by row, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from clipq.kernels.formats import check_dtype
from clipq.kernels.layer_norm import reference
from clipq.kernels.register import register

_TRITON = "clipq.kernels.layer_norm.triton"


def _fake_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    y = x.new_empty((rows, cols) if keep else (0,), dtype=out_dtype)
    vectors = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return (y, x.new_empty((rows, cols), dtype=dtype), *vectors)  # pyright: ignore[reportReturnType]


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dw, db = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), dw, db, dy.new_empty((0,) if bias is None else x.shape)


_quantize = register(
    "layer_norm_quantize",
    "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype, ScalarType dtype, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_quantize,
    fake=_fake_quantize,
    module=_TRITON,
)
_backward = register(
    "layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, Tensor? residual, Tensor? bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_backward,
    fake=_fake_backward,
    module=_TRITON,
)


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out_dtype: torch.dtype, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = layer_norm(x) in float32, rounded to `out_dtype`, then quantized row by row.

    Args:
        x: [M, K] of any floating type.
        weight, bias: [K].
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        keep: return y too.

    Returns:
        y [M, K] of `out_dtype` (or [0] if not kept), q [M, K] of `dtype`, scale [M], mean [M], rstd [M], all float32.
    """
    check_dtype(dtype)
    return _quantize(x, weight, bias, eps, out_dtype, dtype, keep)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of layer norm.

    Args:
        dy: [M, K], gradient of its output.
        x: [M, K], its input; weight [K]; mean, rstd [M] as `layer_norm_quantize` gave them.
        residual: [M, K], added to dx: the gradient that reaches x around the norm.
        bias: [K], the norm's: return its output y too, the bits of `layer_norm_quantize`.

    Returns:
        dx [M, K] of x's type, gradients of weight and bias [K] float32, y [M, K] of dy's type (or [0] without bias).
    """
    return _backward(dy, x, weight, mean, rstd, residual, bias)
