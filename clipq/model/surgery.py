"""Replaces the residual blocks of OpenCLIP's own transformers by `Block`, weights and initialisation kept.

The modules of a block are moved, not copied: norms, activations and layer scales are the very objects, the
linear layers hold the very parameters. What cannot be replaced stays as it is, and the report says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from open_clip import CLIP, CoCa
from open_clip import transformer as openclip
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from clipq.model.block import Attention, Block, Mlp, PatchDropout


@dataclass(frozen=True)
class BlockReport:
    """What the surgery did to a model."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    """Tower (`visual`, `text`) -> names of the blocks that are now ours."""
    kept: dict[str, str] = field(default_factory=dict)
    """Name of a tower, or of a single block -> why it kept its own blocks."""

    def lines(self) -> list[str]:
        """One line for each tower or block, for a console."""
        done = [f"{tower}: {len(names)} blocks replaced" for tower, names in self.replaced.items()]
        return done + [f"{name}: own blocks kept, {why}" for name, why in self.kept.items()]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def blocks(model: nn.Module) -> list[tuple[str, Block]]:
    """Every `Block` of a model with its name, image tower first where the model has one."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]


def replace_blocks(model: nn.Module) -> BlockReport:
    """Replaces, in place, the residual blocks and the patch dropout of an OpenCLIP model.

    To be called before the model is compiled, wrapped or moved to several devices.
    """
    report = BlockReport()
    if isinstance(model, CoCa):
        why = "CoCa feeds them and its caption decoder together through OpenCLIP's own code"
        report.kept.update(dict.fromkeys(("visual", "text", "text_decoder"), why))
        return report
    _replace_visual(model.get_submodule("visual"), report)
    if isinstance(model, CLIP):
        mask = getattr(model, "attn_mask", None)
        _replace_in(model.transformer, "transformer", "text", _is_causal(mask), report)
    else:
        _replace_text(model.get_submodule("text"), report)
    return report


def _replace_visual(visual: nn.Module, report: BlockReport) -> None:
    if isinstance(visual, VisionTransformer):
        _replace_in(visual.transformer, "visual.transformer", "visual", False, report)
        dropout: nn.Module = visual.patch_dropout
        if isinstance(dropout, openclip.PatchDropout):
            visual.add_module("patch_dropout", PatchDropout(dropout.prob))
    elif isinstance(visual, TimmModel):
        report.kept["visual"] = f"a timm model ({type(visual.trunk).__name__}) has blocks of its own kind"
    elif isinstance(visual, ModifiedResNet):
        report.kept["visual"] = "a ResNet has convolutional blocks"
    else:
        report.kept["visual"] = f"unknown kind of image tower ({type(visual).__name__})"


def _replace_text(text: nn.Module, report: BlockReport) -> None:
    if isinstance(text, TextTransformer):
        # A class embedding or a padding mask makes a mask of each batch: only then is the mask read.
        plain = text.cls_emb is None and not text.use_pad_mask
        causal = plain and _is_causal(text.attn_mask)
        _replace_in(text.transformer, "text.transformer", "text", causal, report)
    elif isinstance(text, HFTextEncoder):
        report.kept["text"] = "a Hugging Face text tower has blocks of its own kind"
    else:
        report.kept["text"] = f"unknown kind of text tower ({type(text).__name__})"


def _is_causal(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    if mask.is_meta:  # no numbers to look at, and OpenCLIP's own are causal
        return True
    plain = torch.full_like(mask, -math.inf).triu(1)
    return bool(torch.equal(mask, plain))


def _replace_in(transformer: Transformer, path: str, tower: str, causal: bool, report: BlockReport) -> None:
    for i, old in enumerate(transformer.resblocks):
        name = f"{path}.resblocks.{i}"
        why = _obstacle(old, batch_first=transformer.batch_first)
        if why is not None:
            report.kept[name] = why
            continue
        transformer.resblocks[i] = _from_openclip(old, causal).train(old.training)
        report.replaced.setdefault(tower, []).append(name)


def _obstacle(block: nn.Module, *, batch_first: bool) -> str | None:
    """Why a block cannot be replaced, or None if it can."""
    if type(block) not in (ResidualAttentionBlock, CustomResidualAttentionBlock):
        return f"unknown kind of block ({type(block).__name__})"
    if not batch_first:
        return "it works on (tokens, batch, width)"
    if hasattr(block, "ln_1_kv"):
        return "it is a cross-attention block"
    attn = block.attn
    if isinstance(attn, openclip.Attention):
        dropout = max(attn.attn_drop.p, attn.out_drop.p)
    else:
        assert isinstance(attn, nn.MultiheadAttention)
        dropout = attn.dropout
    return f"its attention has dropout ({dropout})" if dropout > 0 else None


def _from_openclip(old: nn.Module, causal: bool) -> Block:
    child = {name: module for name, module in old.named_modules() if name}
    attn = child["attn"]
    if isinstance(attn, openclip.Attention):
        extras = {n: getattr(attn, n) for n in ("ln_q", "ln_k", "ln_inner", "logit_scale", "head_scale")}
    else:
        assert isinstance(attn, nn.MultiheadAttention)
        extras = {}
    return Block(
        ln_1=child["ln_1"],
        attn=Attention(
            _linear(attn.in_proj_weight, attn.in_proj_bias),
            _linear(attn.out_proj.weight, attn.out_proj.bias),
            attn.num_heads,
            causal=causal,
            **extras,
        ),
        ln_attn=child.get("ln_attn"),
        ls_1=child["ls_1"],
        ln_2=child["ln_2"],
        mlp=Mlp(
            _linear(*_parameters(child["mlp.c_fc"])),
            child["mlp.gelu"],
            _linear(*_parameters(child["mlp.c_proj"])),
            ln=child.get("mlp.ln"),
        ),
        ls_2=child["ls_2"],
    )


def _parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(linear, nn.Linear)
    return linear.weight, linear.bias


def _linear(weight: Tensor | None, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds the given parameters. Built on `meta`: no memory, no random numbers drawn."""
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if isinstance(bias, nn.Parameter):
        linear.bias = bias
    return linear
