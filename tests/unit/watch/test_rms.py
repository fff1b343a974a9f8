"""RMS_t of chosen parameters, from either optimizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from clipq.model.clip import create_model
from clipq.optim import StableAdamW
from clipq.watch.instruments import FeatureWatch
from clipq.watch.rms import RmsWatch, choose

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6}


def test_default_choice(arch: Path) -> None:
    model = create_model(str(arch)).model
    found = choose(model, ["default"])
    assert "visual.conv1.weight" in found
    assert "token_embedding.weight" in found
    assert "visual.positional_embedding" in found
    assert "logit_scale" in found
    layers = {n for n in found if "resblocks" in n}
    # two blocks in the image tower, one in the text tower: first and last of each
    assert layers == {
        f"{tower}.resblocks.{i}.{w}.weight"
        for tower, blocks in (("visual.transformer", (0, 1)), ("transformer", (0,)))
        for i in blocks
        for w in ("attn.in_proj", "mlp.c_fc")
    }
    assert all(dict(model.named_parameters())[n] is p for n, p in found.items())
    assert set(choose(model, ["*"])) == {n for n, _ in model.named_parameters()}
    assert list(choose(model, ["logit_scale", "visual.conv1.*"])) == ["logit_scale", "visual.conv1.weight"]
    with pytest.raises(ValueError, match=r"'visual\.nothing\*' matches no trained parameter"):
        choose(model, ["default", "visual.nothing*"])


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, **k: StableAdamW(p, clip_threshold=math.inf, **k)])
def test_the_definition(make) -> None:
    params = {n: nn.Parameter(torch.randn(s)) for n, s in (("a", (4, 3)), ("b", ()), ("c", (5,)))}
    optimizer = make(params.values(), **SETTINGS)
    watch = RmsWatch(params, optimizer)
    moments = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in params.items()}
    largest = 0.0
    for t in range(1, 31):
        for i, p in enumerate(params.values()):
            size = 20 if t == 25 else 1
            p.grad = size * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
        optimizer.step()
        for (name, p), value in zip(params.items(), watch().tolist(), strict=True):
            g = p.grad.double()
            moments[name] = 0.95 * moments[name] + 0.05 * g**2
            exact = (g**2 / (moments[name] / (1 - 0.95**t)).clamp(min=1e-12)).mean().sqrt().item()
            assert value == pytest.approx(exact, rel=1e-4)
            largest = max(largest, value)
    assert largest > 2.3, "the jump of step 25 is seen"


@pytest.mark.parametrize("make", [torch.optim.AdamW, StableAdamW])
def test_parameters_without_a_gradient(make) -> None:
    params = {n: nn.Parameter(torch.ones(3)) for n in "ab"}
    optimizer = make(params.values(), **SETTINGS)
    watch = RmsWatch(params, optimizer)
    optimizer.step()
    assert watch().isnan().all()
    params["b"].grad = torch.ones(3)
    optimizer.step()
    values = watch()
    assert values[0].isnan()
    assert values[1] == pytest.approx(1, abs=1e-5)


def test_default_choice_in_a_tower_of_timm(tmp_path: Path) -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32, "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "timm.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    model = create_model(str(tmp_path / "timm.json")).model
    found = {n.removeprefix("visual.trunk.") for n in choose(model, ["default"]) if n.startswith("visual.")}
    layers = {f"blocks.{i}.{w}.weight" for i in (0, 11) for w in ("attn.qkv", "mlp.fc1")}
    assert found == {"patch_embed.proj.weight", "pos_embed"} | layers
    features = FeatureWatch(model, torch.device("cpu"))
    assert features.names[:12] == [f"visual.trunk.blocks.{i}" for i in range(12)]
    features.active = True
    model(torch.randn(2, 3, 32, 32), torch.ones(2, 8, dtype=torch.int64))
    assert features.values().isfinite().all()
