"""Conversion of whole models: what is reported, what stays as it was, and weights that are quantized once."""

from __future__ import annotations

import copy
import functools
import importlib

import pytest
import torch
from torch import nn

from clipq.lowp import RECIPES, LowpLinear, convert_linears, get_recipe, quantized_once
from clipq.model.surgery import blocks
from clipq.optim import StableAdamW
from tests.unit.lowp.towers import FUSABLE, NOT_FUSABLE, block_of, model_of, run, tokens

linear_file = importlib.import_module("clipq.lowp.linear")
convert_file = importlib.import_module("clipq.lowp.convert")


class Special(nn.Linear):
    """A layer with a forward of its own."""


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.special = Special(8, 8)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.special(self.mixer(x, x, x)[0]))


def test_report_says_what_became_of_every_layer() -> None:
    model = Zoo()
    report = convert_linears(model, "switchback", filter=lambda name, layer: name != "head")
    assert report.converted == ["first"]
    assert report.recipe == "switchback"
    assert report.implementation == "reference"
    assert set(report.kept) == {"mixer.out_proj", "special", "head"}
    assert "reads the weights itself" in report.kept["mixer.out_proj"]
    assert "subclass of nn.Linear (Special)" in report.kept["special"]
    assert "filter" in report.kept["head"]
    assert type(model.first) is LowpLinear
    assert type(model.special) is Special
    assert str(report).splitlines()[0] == "switchback: 1 linear layers, 0 blocks fused (reference)"
    assert len(report.lines()) == 4
    model(torch.randn(2, 3, 8)).sum().backward()


def test_attention_at_the_root() -> None:
    mixer = nn.MultiheadAttention(8, 2)
    report = convert_linears(mixer, "switchback")
    assert list(report.kept) == ["out_proj"]
    assert not report.converted


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dict_stays_as_it_was(recipe, tmp_path) -> None:
    model = model_of(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    report = convert_linears(model, recipe)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [id(p) for p in model.parameters()] == identities
    other = model_of(tmp_path)
    convert_linears(other, recipe)
    other.load_state_dict(before)
    expected = 0 if recipe == "bf16" else 4 * len(blocks(model))
    assert len(report.converted) == expected


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match=r"recipe 'int4': expected one of bf16, llm_int8, switchback"):
        convert_linears(Zoo(), "int4")


def test_second_conversion_changes_nothing(tmp_path) -> None:
    model = model_of(tmp_path)
    first = convert_linears(model, "switchback")
    kinds = [(type(m), getattr(m, "fused", None)) for m in model.modules()]
    second = convert_linears(model, "switchback_q")
    assert not second.converted
    assert all("follows recipe switchback already" in second.kept[name] for name in first.converted)
    assert [(type(m), getattr(m, "fused", None)) for m in model.modules()] == kinds
    assert not second.fused


def test_simulated_recipes_say_so() -> None:
    assert convert_linears(Zoo(), "fp8_sim").implementation == "simulated"
    assert convert_linears(Zoo(), "fp8").implementation == "reference"
    assert convert_linears(Zoo(), get_recipe("bf16")).converted == []


@pytest.mark.parametrize("settings", FUSABLE.values(), ids=FUSABLE)
def test_blocks_are_fused(settings, tmp_path) -> None:
    model = model_of(tmp_path, settings)
    names = [name for name, _ in blocks(model)]
    report = convert_linears(model, "switchback")
    assert report.fused == names
    assert [name for name, _ in blocks(model)] == names, "a fused block is still a Block"
    assert len({block.fused for _, block in blocks(model)}) == 1, "each would be compiled anew"


@pytest.mark.parametrize(
    ("settings", "recipe", "reason"),
    [
        (NOT_FUSABLE["norm in the MLP"], "switchback", "neither GELU nor QuickGELU"),
        ({}, "llm_int8", "16-bit weight gradients"),
        ({}, "fp8", "row by row"),
        ({}, "switchback_fp8_sim", "row by row"),
        ({}, "int8_stochastic", "16-bit weight gradients"),
    ],
)
def test_why_a_block_is_not_fused(settings, recipe, reason, tmp_path) -> None:
    model = model_of(tmp_path, settings)
    report = convert_linears(model, recipe)
    assert not [name for name in report.fused if "visual" in name]
    assert len(report.converted) == 4 * len(blocks(model))
    for name, block in blocks(model):
        if "visual" in name:
            assert "not fused" in report.kept[name]
            assert reason in report.kept[name], report.kept[name]
            run(block, tokens())


def test_a_block_with_a_layer_left_out_is_not_fused(tmp_path) -> None:
    model = model_of(tmp_path)
    report = convert_linears(model, "switchback", filter=lambda name, layer: "resblocks.0.mlp.c_proj" not in name)
    assert sorted(report.fused) == sorted(n for n, _ in blocks(model) if n.endswith(".1"))
    assert sum("mlp.c_proj is not in low precision" in why for why in report.kept.values()) == 2


# --- weights quantized once


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each quantization of a weight."""
    calls: list[int] = []

    for file in (linear_file, convert_file):
        original = file.quantize_weight

        def count(*args, original=original):
            calls.append(1)
            return original(*args)

        monkeypatch.setattr(file, "quantize_weight", count)
    return calls


@pytest.mark.parametrize("fused", [True, False])
def test_weights_are_quantized_once_for_all_micro_steps(fused, tmp_path, counted, monkeypatch) -> None:
    block = block_of(tmp_path)
    if not fused:
        monkeypatch.setattr(convert_file, "fuse", lambda block: "no")
    convert_linears(block, "switchback")
    plain = [run(block, tokens(n)) for n in (1, 2, 3)]
    assert len(counted) == 12
    counted.clear()
    with quantized_once(block):
        assert len(counted) == 4
        held = [run(block, tokens(n)) for n in (1, 2, 3)]
        assert len(counted) == 4
    for a, b in zip(held, plain, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_weights_may_change_between_blocks(tmp_path, counted) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    with quantized_once(block):
        before = block(tokens())
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(1.5)
    fresh = copy.deepcopy(block)
    after = block(tokens())
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(tokens()))
    with quantized_once(block):
        assert torch.equal(block(tokens()), after)


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, functools.partial(torch.optim.AdamW, fused=True), StableAdamW],
    ids=["plain", "fused", "stable"],
)
def test_a_weight_changed_inside_is_an_error(make, tmp_path) -> None:
    """Fused optimizers change weights without counting up their version."""
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    optimizer = make(block.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"weight .*changed inside of quantized_once"), quantized_once(block):  # noqa: PT012
        block(tokens()).sum().backward()
        optimizer.step()
    expected = copy.deepcopy(block)(tokens())
    assert torch.equal(block(tokens()), expected), "the old weight is not used any more"


def test_a_copy_made_inside_holds_nothing(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    with quantized_once(block):
        twin = copy.deepcopy(block)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(twin(tokens()), tokens())


def test_an_error_inside_comes_through(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    with pytest.raises(KeyError), quantized_once(block):
        raise KeyError
    assert all(m._held is None for m in block.modules() if isinstance(m, LowpLinear))


def test_evaluation_between_uses_no_gradients(tmp_path, counted) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    with torch.no_grad():
        expected = block(tokens())
        with quantized_once(block):
            assert torch.equal(block(tokens()), expected)
