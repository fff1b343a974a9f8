"""The low-precision product, with dequantization, bias and a residual in its epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from clipq.kernels.formats import check_dtype
from clipq.kernels.matmul import reference
from clipq.kernels.register import register


def _fake(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(a, b, a_scale, b_scale, bias, residual, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


_matmul = register(
    "matmul",
    "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, Tensor? residual, ScalarType out_dtype)"
    " -> Tensor",
    reference=reference.matmul,
    fake=_fake,
    module="clipq.kernels.matmul.triton",
)

_matmul16 = register(
    "matmul16",
    "(Tensor a, Tensor b) -> Tensor",
    reference=reference.matmul16,
    fake=lambda a, b: a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32),
    module="clipq.kernels.matmul.triton",
)


@register_flop_formula([torch.ops.clipq.matmul, torch.ops.clipq.matmul16])
def _flops(a_shape: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """For `torch.utils.flop_counter`, which would else count nothing in converted models."""
    return 2 * a_shape[1] * out_shape.numel()


def matmul16(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16-bit matrices with the float32 sums returned as they are: a weight gradient that needs no conversion.

    Args:
        a: [M, K], b: [K, N] of one floating type.

    Returns:
        [M, N] float32.
    """
    return _matmul16(a, b)


def matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """a bᵀ · a_scale · b_scale + bias + residual.

    Products of int8 are summed exactly in int32, 131,072 at a time, and these sums in float32; products of fp8 in
    float32, on Hopper with the tensor core's own, shorter, accumulation. The epilogue is float32, rounded once.

    Args:
        a: [M, K], torch.int8 or fp8, unit stride along K.
        b: [N, K] of the same kind, unit stride along K.
        a_scale: [M] or [] float32.
        b_scale: [N] or [] float32.
        bias: [N] of any floating type.
        residual: [M, N] of `out_dtype`, contiguous.

    Returns:
        [M, N] of `out_dtype`.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if not torch.compiler.is_compiling():  # there the fake implementation checks, without a trace in the graph
        _check(a, b, a_scale, b_scale, bias, residual, out_dtype)
    return _matmul(a, b, a_scale, b_scale, bias, residual, out_dtype)


def _check(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    (M, K), (N, K_b) = a.shape, b.shape
    if K_b != K:
        raise ValueError(f"matmul of a {M}×{K} with b {N}×{K_b}: expected the same inner (last) dimension")
    check_dtype(a.dtype)
    check_dtype(b.dtype)
    if (a.dtype is torch.int8) != (b.dtype is torch.int8):
        raise ValueError(f"matmul of {a.dtype} with {b.dtype}: expected both int8 or both fp8")
    if a_scale.numel() not in (1, M) or b_scale.numel() not in (1, N):
        raise ValueError(
            f"matmul of a {M}×{K} with b {N}×{K}: a_scale has {a_scale.numel()} elements and b_scale "
            f"{b_scale.numel()}, expected {M} or 1 and {N} or 1"
        )
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"matmul: bias of shape {tuple(bias.shape)}, expected ({N},)")
    if residual is not None and (residual.shape != (M, N) or residual.dtype is not out_dtype):
        raise ValueError(
            f"matmul: residual of shape {tuple(residual.shape)} and {residual.dtype}, expected ({M}, {N}) and "
            f"{out_dtype}"
        )
