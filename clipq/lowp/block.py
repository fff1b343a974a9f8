"""A residual block whose norms, activation and linear layers are fused. See `fused.py` for the pieces."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from clipq.lowp.fused import norm_linear, norm_mlp
from clipq.lowp.linear import LowpLinear

GELU_KINDS = {"gelu": False, "quick_gelu": True}
"""Kinds of a block's activation that there are kernels for -> whether it is the quick one."""


class FusedBlock(nn.Module):
    """Forward of a pre-norm block; `fuse` makes it the class of a block, whose own class stays a base.

    The block has `ln_1`, `attn` (with `in_proj`, `attend` and `out_proj`), `ln_attn`, `ls_1`, `ln_2`, `mlp` (with
    `c_fc`, `act` and `c_proj`), `ls_2`, `pairs()` and `linears()`, as `clipq.model.block.Block` has.
    """

    def forward(self, x_BLD: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        if k_x is not None or v_x is not None:
            raise NotImplementedError("clipq's Block is self-attention only: k_x and v_x must be None")
        me: Any = self
        qkv, x_BLD = norm_linear(x_BLD, me.ln_1, me.attn.in_proj)
        mixed_BLD = me.attn.attend(qkv, attn_mask)
        if _passes(me.ls_1) and _passes(me.ln_attn):
            x_BLD = me.attn.out_proj(mixed_BLD, residual=x_BLD)
        else:
            x_BLD = x_BLD + me.ls_1(me.ln_attn(me.attn.out_proj(mixed_BLD)))
        mlp = me.mlp
        quick = GELU_KINDS[me.fused_activation]
        if _passes(me.ls_2):
            return norm_mlp(x_BLD, me.ln_2, mlp.c_fc, mlp.c_proj, quick=quick, add=True)  # pyright: ignore[reportReturnType]
        branch_BLD, x_BLD = norm_mlp(x_BLD, me.ln_2, mlp.c_fc, mlp.c_proj, quick=quick, add=False)
        return x_BLD + me.ls_2(branch_BLD)


def _passes(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def fuse(block: nn.Module) -> str | None:
    """Turns a block whose four linear layers are low-precision ones into a fused one, in place.

    Returns:
        None, or why it cannot be fused; the block is then as it was.
    """
    pairs = {pair.linear: pair for pair in block.pairs()}  # pyright: ignore[reportCallIssue]
    for name in block.linears():  # pyright: ignore[reportCallIssue]
        layer = block.get_submodule(name)
        if not isinstance(layer, LowpLinear):
            return f"{name} is not in low precision"
        if not layer.recipe.fusable:
            return f"recipe {layer.recipe.name} does not quantize row by row with 16-bit weight gradients"
        if layer.bias is None:
            return f"{name} has no bias"
    for name in ("attn.in_proj", "mlp.c_fc"):
        norm = block.get_submodule(pairs[name].producer)
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return f"{pairs[name].producer} is not a layer norm with weight and bias"
    activation = pairs["mlp.c_proj"].kind
    if activation not in GELU_KINDS:
        return f"{pairs['mlp.c_proj'].producer} is neither GELU nor QuickGELU"
    block.fused_activation = activation  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    block.__class__ = _fused_class(type(block))
    return None


@functools.cache  # blocks of one class must share it, or each would be compiled anew
def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (FusedBlock, kind), {})
