"""Errors of layers against a product by hand; the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipq.lowp import convert_linears
from clipq.model.clip import create_model
from clipq.model.surgery import blocks
from clipq.watch.quantization import quantization_errors
from tests.helpers import tiny_arch


@pytest.fixture
def clip(tmp_path) -> nn.Module:
    return create_model(str(tiny_arch(tmp_path))).model


def inputs(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(pairs, 3, 16, 16, generator=g), torch.randint(1, 49408, (pairs, 8), generator=g)


def test_a_layer_by_hand(clip: nn.Module) -> None:
    """The first layer of the image tower gets what is not quantized yet: int8 by hand, row by row and the whole."""
    seen: list[torch.Tensor] = []
    first = "visual.transformer.resblocks.0.attn.in_proj"
    clip.get_submodule(first).register_forward_hook(lambda m, x, y: seen.append(x[0].detach()))
    image, text = inputs(20)
    clip.eval()(image[:8], text[:8])
    (x,) = seen
    layer = clip.get_submodule(first)
    weight, bias = layer.get_parameter("weight").detach(), layer.get_parameter("bias").detach()
    convert_linears(clip, "switchback", filter=lambda name, _: "resblocks" in name)
    errors = quantization_errors(clip, image, text)
    assert len(errors) == 12
    s_x, s_w = x.abs().amax(-1, keepdim=True) / 127, weight.abs().max() / 127
    y = ((x / s_x).round() @ (weight / s_w).round().T) * s_x * s_w + bias
    exact = x @ weight.T + bias
    assert errors[first] == pytest.approx(((y - exact).norm() / exact.norm()).item(), rel=1e-3)


def test_the_model_is_left_as_it_was(clip: nn.Module) -> None:
    convert_linears(clip, "switchback", filter=lambda name, _: "resblocks" in name)
    fused = {name: block.fused for name, block in blocks(clip)}  # pyright: ignore[reportAttributeAccessIssue]
    assert all(fused.values()), "nothing is fused: the test shows nothing"
    for _, block in blocks(clip):
        block.forward = torch.compile(block.forward, backend="eager")
    forwards = {name: block.__dict__["forward"] for name, block in blocks(clip)}
    clip.train()
    clip.get_submodule("visual.ln_post").eval()  # as a user may have frozen a part
    modes = {name: m.training for name, m in clip.named_modules()}
    generator = torch.get_rng_state()
    assert len(quantization_errors(clip, *inputs(4))) == 12
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: m.training for name, m in clip.named_modules()} == modes
    assert all(p.grad is None for p in clip.parameters())
    for name, block in blocks(clip):
        assert block.__dict__["forward"] is forwards[name]
        assert block.fused is fused[name]
    assert not any(m._forward_hooks for m in clip.modules())


def test_nothing_to_measure(clip: nn.Module) -> None:
    assert quantization_errors(clip, *inputs(2)) == {}
