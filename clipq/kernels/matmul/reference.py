"""The low-precision product in plain torch; its signature is that of the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from clipq.kernels.formats import MOST_TERMS


def matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    acc = _int_sums(a, b) if a.dtype is torch.int8 else a.float() @ b.float().T
    # one factor for both scales unless each is a vector, as in the kernels: the same rounding
    out = acc * (a_scale * b_scale).reshape(-1, 1) if b_scale.numel() == 1 else acc * a_scale.reshape(-1, 1) * b_scale
    if bias is not None:
        out = out + bias.float()
    if residual is not None:
        out = out + residual.float()
    return out.to(out_dtype)


def _int_sums(a: Tensor, b: Tensor) -> Tensor:
    parts = range(0, max(1, a.shape[1]), MOST_TERMS)
    return sum(torch.ops.aten._int_mm(a[:, k : k + MOST_TERMS], b[:, k : k + MOST_TERMS].T).float() for k in parts)  # pyright: ignore[reportReturnType]


def matmul16(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float()
