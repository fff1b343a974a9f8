"""Layers and blocks that are used in ways one would not think of first."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from clipq.lowp import RECIPES, LinearRecipe, LowpLinear, Operand, Product, Scales, convert_linears, quantized_once
from clipq.lowp.linear import linear
from tests.unit.lowp.towers import WIDTH, Counted, block_of, run, tokens

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
V, T = Scales.vector, Scales.tensor
SWITCHBACK = RECIPES["switchback"]


def test_sums_of_int8_beyond_int32() -> None:
    """133,144 products of 127 and 127 are more than 2³¹."""
    for recipe in ("switchback", "llm_int8"):
        wide = nn.Linear(140_000, 1, bias=False)
        nn.init.ones_(wide.weight)
        convert_linears(wide, recipe)
        assert wide(torch.ones(2, 140_000)).flatten().tolist() == pytest.approx([140_000] * 2)
    long = nn.Linear(2, 3, bias=False)
    convert_linears(long, "llm_int8")
    long(torch.ones(140_000, 2)).sum().backward()
    assert long.weight.grad is not None
    assert long.weight.grad.flatten().tolist() == pytest.approx([140_000] * 6)


@pytest.mark.parametrize("hook_made", [lambda m: prune.l1_unstructured(m, "weight", 0.3), torch.nn.utils.weight_norm])
def test_weights_made_in_each_forward_are_not_held(hook_made) -> None:
    layer = nn.Linear(16, 8)
    hook_made(layer)
    model = nn.Sequential(layer)
    convert_linears(model, "switchback")
    x = torch.randn(5, 16)
    model(x)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    expected = model(x)
    with quantized_once(model):
        assert torch.equal(model(x), expected)


def test_holding_twice() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    convert_linears(model, "switchback")
    with quantized_once(model):
        with quantized_once(model):
            pass
        with Counted("clipq::quantize_tensor") as counted:
            model(torch.randn(2, 8))
        assert counted.calls == 0, "the inner block ended the outer one's"
    with Counted("clipq::quantize_tensor") as counted:
        model(torch.randn(2, 8))
    assert counted.calls == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_encoder_layers_of_torch_evaluate_as_they_train(autocast) -> None:
    """In evaluation torch would hand their weights to a kernel of its own."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)
    low = copy.deepcopy(plain)
    report = convert_linears(low, "switchback")
    assert "layers.0.linear1" in report.converted
    x = torch.randn(3, 7, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained, evaluated = low.train()(x), low.eval()(x)
        assert not torch.equal(evaluated, plain.eval()(x))
    torch.testing.assert_close(evaluated, trained, atol=3e-2 if autocast else 1e-5, rtol=0)


def test_blocks_of_two_recipes_are_not_fused(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback", filter=lambda name, _: not name.endswith("c_proj"))
    report = convert_linears(block, "switchback_m")
    assert not report.fused
    assert report.kept[""] == "not fused, mlp.c_proj follows another recipe than attn.in_proj"
    run(block, tokens())


def test_blocks_whose_parts_must_be_called_are_not_fused(tmp_path) -> None:
    seen = []
    block = block_of(tmp_path)
    block.ln_2.register_forward_hook(lambda *_: seen.append(1))
    report = convert_linears(block, "switchback")
    assert report.kept[""] == "not fused, ln_2 has hooks, and a fused block does not call it"
    block(tokens())
    assert seen
    block = block_of(tmp_path)
    prune.l1_unstructured(block.mlp.c_fc, "weight", 0.3)
    assert "c_fc" in convert_linears(block, "switchback").kept[""]
    for _ in range(2):
        block(tokens()).sum().backward()
    block = block_of(tmp_path)
    block.ln_1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
    assert "ln_1 is not a layer norm with weight and bias" in convert_linears(block, "switchback").kept[""]


def test_modules_of_others_may_be_called_anything() -> None:
    class Other(nn.Module):
        fused = None

    report = convert_linears(nn.Sequential(Other(), nn.Linear(4, 4)), "switchback")
    assert report.converted == ["1"]
    assert not report.kept


def test_converting_back_is_refused_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    convert_linears(model, "switchback")
    assert convert_linears(model, "bf16").kept == {"0": "it follows recipe switchback already"}


ONE = Product(Operand(INT8, V), Operand(INT8, T))


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ({"output": ONE}, "output and grad_input go together"),
        ({"grad_input": ONE}, "output and grad_input go together"),
        ({"grad_weight": ONE}, "only where they are"),
        ({"output": ONE, "grad_input": Product(Operand(INT8, V), Operand(E4M3, T))}, "grad_input multiplies"),
        ({"output": replace(ONE, stochastic=True), "grad_input": ONE}, "output: only a grad_weight"),
        ({"output": ONE, "grad_input": ONE, "grad_weight": replace(ONE, stochastic=True)}, "with vectors"),
    ],
)
def test_recipes_that_cannot_be(products, message) -> None:
    with pytest.raises(ValueError, match=message):
        LinearRecipe("mine", **products)


def test_layers_by_name_of_the_recipe() -> None:
    assert LowpLinear(4, 4, recipe="switchback").recipe is SWITCHBACK
    with pytest.raises(ValueError, match=r"bf16 is of 16 bits: use nn\.Linear"):
        LowpLinear(4, 4, recipe="bf16")


def test_inputs_that_cannot_be() -> None:
    layer = LowpLinear(4, 4, recipe="switchback")
    for x in (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="expected a real floating type"):
            layer(x)
    with pytest.raises(ValueError, match=r"input of shape \(\)"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"residual of shape \(3, 2, 4\), expected \(2, 3, 4\)"):
        layer(torch.ones(2, 3, 4), residual=torch.ones(3, 2, 4))
    with pytest.raises(ValueError, match="recipe bf16"):
        linear(torch.ones(2, 4), torch.ones(4, 4), None, RECIPES["bf16"])


def test_second_derivatives_are_refused(tmp_path) -> None:
    for module in (LowpLinear(WIDTH, 4, recipe="switchback"), block_of(tmp_path)):
        if not isinstance(module, LowpLinear):
            convert_linears(module, "switchback")
        x = tokens().requires_grad_()
        (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_outputs_may_be_changed_in_place() -> None:
    layer = LowpLinear(8, 8, recipe="switchback")
    x = torch.randn(2, 3, 8, requires_grad=True)
    layer(x).relu_().sum().backward()
    assert x.grad is not None


def test_frozen_parts_cost_nothing(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    for frozen, products in (((), 4), (("mlp.c_fc",), 3), (("mlp.c_fc", "mlp.c_proj", "attn.in_proj"), 1), (("",), 0)):
        block.requires_grad_(True)
        for name in frozen:
            block.get_submodule(name).requires_grad_(False)
        y = block(tokens().requires_grad_())
        with Counted("clipq::matmul16") as counted:
            y.sum().backward()
        assert counted.calls == products, frozen


def test_shapes_without_data() -> None:
    layer = LowpLinear(8, 4, recipe="switchback", device="meta")
    assert layer(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 4)
