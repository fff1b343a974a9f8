"""Small models with clipq's blocks, of every kind that fusing has to tell apart."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipq.lowp import ConversionReport, convert, convert_linears
from clipq.model.block import Block
from clipq.model.clip import create_model
from clipq.model.surgery import blocks

FUSABLE = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.1},
    "layer scale of zero": {"ls_init_value": 0.0},
    "qk norm": {"qk_norm": True},
    "quick gelu": {"quick_gelu": True},
    "head scale": {"scale_heads": True},
    "norm of the attention branch": {"scale_attn": True},
    "norm of the heads": {"scale_attn_inner": True},
}
"""Settings of a tower whose blocks can be fused."""
NOT_FUSABLE = {"norm in the MLP": {"scale_fc": True}}
RECIPES = ("switchback", "switchback_m", "switchback_r", "switchback_q", "switchback_fp8")
"""The recipes that can be fused."""
WIDTH = 32


def model_of(folder: Path, settings: dict[str, Any] | None = None, layers: int = 2) -> nn.Module:
    """A CLIP model, its parameters moved away from their initial values but for a layer scale of zero."""
    settings = dict(settings or {})
    quick = settings.pop("quick_gelu", False)
    vision = {"image_size": 32, "patch_size": 8, "width": WIDTH, "head_width": 16, "layers": layers} | settings
    text_settings = {k: v for k, v in settings.items() if k in ("ls_init_value", "qk_norm")}
    text = {"context_length": 6, "vocab_size": 64, "width": WIDTH, "heads": 2, "layers": layers} | text_settings
    config = {"embed_dim": 16, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
    path = folder / "tower.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    model = create_model(str(path)).model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not (settings.get("ls_init_value") == 0 and ".ls_" in name):
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def block_of(folder: Path, settings: dict[str, Any] | None = None) -> Block:
    return blocks(model_of(folder, settings, layers=1))[0][1].train()


def convert_unfused(model: nn.Module, recipe: str, monkeypatch) -> ConversionReport:
    with monkeypatch.context() as patch:
        patch.setattr(convert, "fuse", lambda block: "a test asked for it")
        return convert_linears(model, recipe)


def both(block: Block, recipe: str, monkeypatch) -> tuple[Block, Block]:
    """A block converted and fused, and converted only."""
    fused, unfused = block, copy.deepcopy(block)
    assert convert_linears(fused, recipe).fused == [""]
    assert not convert_unfused(unfused, recipe, monkeypatch).fused
    unfused.attn.out_proj.recipe = fused.attn.out_proj.recipe  # of switchback_m a fused block keeps the input as it is
    return fused, unfused


def tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(batch * 100 + length))


def run(block: Any, x: Tensor, autocast: bool = False, **kwargs: Any) -> dict[str, Tensor]:
    """Output, input gradient and the gradients of all parameters."""
    for p in block.parameters():
        p.grad = None
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x, **kwargs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    (y * weight).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


def assert_equal_runs(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Each tensor within `share` of the norm of the expected one; a bias of the keys has no gradient but noise."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        if name == "attn.ln_k.bias":
            continue
        a, b = found[name].double(), value.double()
        if name == "attn.in_proj.bias":
            keep = torch.arange(len(a)) // (len(a) // 3) != 1
            a, b = a[keep], b[keep]
        off = ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
        assert off <= share, f"{name}: off by {off:.3g}"


class Counted(TorchDispatchMode):
    """Counts the calls of an operator, as "clipq::matmul16"."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.name() == self.name
        return func(*args, **kwargs or {})
