"""A residual block whose norms, activation and linear layers are fused. See `fused.py` for the pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from clipq.lowp.fused import norm_mlp, norm_projections
from clipq.lowp.linear import LowpLinear
from clipq.lowp.recipe import Saved


def _forward(block: Any, x_BLD: Tensor, attn_mask: Tensor | None, *, quick: bool) -> Tensor:
    """The block's function; `block` has the parts of `clipq.model.block.Block`."""
    q_BLD, k_BLD, v_BLD, x_BLD = norm_projections(x_BLD, block.ln_1, block.attn.in_proj)
    mixed_BLD = block.attn.attend(q_BLD, k_BLD, v_BLD, attn_mask)
    if _passes(block.ls_1) and _passes(block.ln_attn):
        x_BLD = block.attn.out_proj(mixed_BLD, residual=x_BLD)
    else:
        x_BLD = x_BLD + block.ls_1(block.ln_attn(block.attn.out_proj(mixed_BLD)))
    layers = (block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
    if _passes(block.ls_2):
        return norm_mlp(x_BLD, *layers, quick=quick, add=True)  # pyright: ignore[reportReturnType]
    branch_BLD, x_BLD = norm_mlp(x_BLD, *layers, quick=quick, add=False)
    return x_BLD + block.ls_2(branch_BLD)


def gelu_block(block: nn.Module, x_BLD: Tensor, attn_mask: Tensor | None) -> Tensor:
    return _forward(block, x_BLD, attn_mask, quick=False)


def quick_gelu_block(block: nn.Module, x_BLD: Tensor, attn_mask: Tensor | None) -> Tensor:
    return _forward(block, x_BLD, attn_mask, quick=True)


FORWARDS = {"gelu": gelu_block, "quick_gelu": quick_gelu_block}
"""Kinds of a block's activation that there are kernels for, and the block's forward."""


def _passes(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _needs_its_own_call(module: nn.Module) -> str | None:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has another forward than its class"
    made = isinstance(module, nn.Linear) and "weight" not in module._parameters
    return "computes its weight (pruning, weight norm)" if made else None


def fuse(block: Any) -> str | None:
    """Makes a block (`clipq.model.block.Block`) whose four linear layers are in low precision a fused one, in place.

    Returns:
        None, or why it cannot be fused; the block is then as it was.
    """
    pairs = {pair.linear: pair for pair in block.pairs()}
    recipe = block.attn.in_proj.recipe if isinstance(block.attn.in_proj, LowpLinear) else None
    for name in block.linears():
        layer = block.get_submodule(name)
        if not isinstance(layer, LowpLinear):
            return f"{name} is not in low precision"
        if layer.recipe != recipe:
            return f"{name} follows another recipe than attn.in_proj"
        if not layer.recipe.fusable:
            return f"recipe {layer.recipe.name} does not quantize row by row with 16-bit weight gradients"
    for name, module in block.named_modules():
        # what `attend` calls is called; attn.out_proj is called with the residual, which a hook does not expect
        why = None if name in ("", "attn.ln_q", "attn.ln_k", "attn.ln_inner") else _needs_its_own_call(module)
        if why is not None:
            return f"{name} {why}, and a fused block does not call it"
    for name in ("attn.in_proj", "mlp.c_fc"):
        norm = block.get_submodule(pairs[name].producer)
        if pairs[name].kind != "layer_norm" or norm.weight is None or norm.bias is None:
            return f"{pairs[name].producer} is not a layer norm with weight and bias, or a subclass of it"
    activation = pairs["mlp.c_proj"].kind
    if activation not in FORWARDS:
        return f"{pairs['mlp.c_proj'].producer} is neither GELU nor QuickGELU"
    out_proj = block.attn.out_proj
    if out_proj.recipe.saved is Saved.quantized and _passes(block.attn.ln_inner) and block.attn.head_scale is None:
        # attention keeps its output for its own backward: a quantized copy would only add to it
        out_proj.recipe = replace(out_proj.recipe, saved=Saved.input)
    block.fused = FORWARDS[activation]
    return None
