"""The low-precision product in plain torch; its signature is that of the operator."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    acc = torch.ops.aten._int_mm(a, b.T).float() if a.dtype is torch.int8 else a.float() @ b.float().T
    # one factor for both scales unless each is a vector, as in the kernels: the same rounding
    out = acc * (a_scale * b_scale).reshape(-1, 1) if b_scale.numel() == 1 else acc * a_scale.reshape(-1, 1) * b_scale
    if bias is not None:
        out = out + bias.float()
    if residual is not None:
        out = out + residual.float()
    return out.to(out_dtype)


def matmul16(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float()
