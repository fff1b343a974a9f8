"""Weights in 8 bits on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipq import kernels
from clipq.cli.export import matrices
from clipq.lowp import convert_linears
from clipq.model.clip import create_model
from clipq.model.packed import packed, unpacked
from clipq.model.weights import load_openclip, to_openclip


def test_what_comes_out_is_within_half_a_step(arch: Path) -> None:
    model = create_model(str(arch)).model
    weights, keys = to_openclip(model), matrices(model)
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in keys
    assert len(keys) == 4 * 3, "four of each of three blocks"
    small = packed(weights, keys)
    assert {key for key, t in small.items() if t.dtype is torch.int8} == keys
    again = unpacked(dict(small))
    assert again.keys() == weights.keys()
    for key, weight in weights.items():
        if key in keys:
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((again[key] - weight).abs() <= 0.5001 * step).all()
            assert not torch.equal(again[key], weight)
        else:
            torch.testing.assert_close(again[key], weight, rtol=1e-3, atol=1e-6)
    load_openclip(model, again)


def test_the_same_8_bits_come_out_as_went_in(arch: Path) -> None:
    """So that inference by `switchback_q` on packed weights is what it is on the whole ones."""
    plain = create_model(str(arch)).model.eval()
    weights, keys = to_openclip(plain), matrices(plain)
    again = unpacked(packed(weights, keys))
    for key in keys:
        for before, after in zip(
            *(kernels.quantize_rows(w[key], torch.int8)[:2] for w in (weights, again)), strict=True
        ):
            torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    other = create_model(str(arch)).model.eval()
    load_openclip(other, {key: again[key] if key in keys else weight for key, weight in weights.items()})
    images = torch.randn(2, 3, 16, 16)
    for model in (plain, other):
        convert_linears(model, "switchback_q", filter=lambda name, _: "resblocks" in name)
    with torch.no_grad():
        torch.testing.assert_close(other.encode_image(images), plain.encode_image(images), rtol=1e-4, atol=1e-5)


def test_other_files_are_left_as_they_are(arch: Path) -> None:
    weights = to_openclip(create_model(str(arch)).model)
    assert unpacked(weights) is weights
    odd = {"a.scale": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}
    assert unpacked(odd) is odd


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("key", ["visual.proj", "visual.transformer.resblocks.0.mlp.c_fc.weight"])
def test_what_cannot_be_packed(key: str, value: float, arch: Path) -> None:
    model = create_model(str(arch)).model
    with torch.no_grad():
        model.get_parameter(key)[0, 0] = value
    if key != "visual.proj" and value == 1e6:
        packed(to_openclip(model), matrices(model))  # a scale in float32 holds it
        return
    with pytest.raises(ValueError, match=f"{key} is not finite, or larger than float16 holds"):
        packed(to_openclip(model), matrices(model))
