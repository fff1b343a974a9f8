"""Layers and blocks that are used in ways one would not think of first."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("part", ["linear1", "linear2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_encoder_layers_of_torch_evaluate_as_they_train(autocast, part, masked) -> None:
    """In evaluation torch would hand their weights to a kernel of its own, where masked as nested tensors."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)
    low = copy.deepcopy(plain)
    report = convert_linears(low, "switchback", filter=lambda name, _: name.endswith(part))
    assert report.converted == [f"layers.{i}.{part}" for i in range(2)]
    x = torch.randn(3, 7, 32)
    mask = torch.arange(7).expand(3, 7) >= 5 if masked else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained, evaluated = (low.train(mode)(x, src_key_padding_mask=mask)[:, :5] for mode in (True, False))
        assert not torch.equal(evaluated, plain.train()(x, src_key_padding_mask=mask)[:, :5])
    torch.testing.assert_close(evaluated, trained, atol=3e-2 if autocast else 1e-5, rtol=0)


def test_blocks_of_two_recipes_are_not_fused(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback", filter=lambda name, _: not name.endswith("c_proj"))
    report = convert_linears(block, "switchback_m")
    assert not report.fused
    assert report.kept[""] == "not fused, mlp.c_proj follows another recipe than attn.in_proj"
    run(block, tokens())


PARTS = ["ln_1", "attn", "attn.in_proj", "attn.out_proj", "ls_1", "ln_2", "mlp", "mlp.c_fc", "mlp.act", "ls_2"]


@pytest.mark.parametrize("part", PARTS)
def test_hooks_see_what_their_module_gives(part, tmp_path) -> None:
    """A fused block calls no part, or calls it with the residual."""
    seen, block = [], block_of(tmp_path)
    plain = copy.deepcopy(block)
    for b in (plain, block):
        b.get_submodule(part).register_forward_hook(lambda _, __, out: seen.append(out))
    report = convert_linears(block, "switchback")
    assert report.kept[""] == f"not fused, {part} has hooks, and a fused block does not call it"
    plain(tokens())
    block(tokens())
    before, after = seen
    assert (after - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("part", ["ln_1", "mlp.c_fc", "mlp.act", "mlp"])
def test_a_forward_of_its_own_is_called(part, tmp_path) -> None:
    block = block_of(tmp_path)
    module = block.get_submodule(part)
    forward = module.forward
    module.forward = lambda *args: 3 * forward(*args)
    expected = block(tokens())
    report = convert_linears(block, "switchback")
    assert not report.fused
    assert (block(tokens()) - expected).norm() < 0.05 * expected.norm()


def test_a_norm_of_another_class_is_called(tmp_path) -> None:
    class Thrice(nn.LayerNorm):
        def forward(self, input):
            return 3 * super().forward(input)

    block = block_of(tmp_path)
    block.ln_1 = Thrice(WIDTH)
    expected = block(tokens())
    report = convert_linears(block, "switchback")
    assert report.kept[""] == "not fused, ln_1 is not a layer norm with weight and bias, or a subclass of it"
    assert (block(tokens()) - expected).norm() < 0.05 * expected.norm()


def test_blocks_whose_weights_are_computed_are_not_fused(tmp_path) -> None:
    block = block_of(tmp_path)
    prune.l1_unstructured(block.mlp.c_fc, "weight", 0.3)
    assert "c_fc" in convert_linears(block, "switchback").kept[""]
    for _ in range(2):
        block(tokens()).sum().backward()
    block = block_of(tmp_path)
    block.ln_1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
    assert "ln_1 is not a layer norm with weight and bias" in convert_linears(block, "switchback").kept[""]


def test_a_module_with_two_names_is_converted_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})
    report = convert_linears(model, "switchback")
    assert report.converted == ["a", "c"]
    assert report.kept == {"b": "it is the same module as a"}


def test_flops_are_those_of_the_plain_layer() -> None:
    def flops(layer: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(5, 3, 8, requires_grad=True)).sum().backward()
        return counter.get_total_flops()

    plain = nn.Sequential(nn.Linear(8, 12))
    expected = flops(plain)
    assert expected == 3 * 2 * 15 * 8 * 12
    for recipe in ("switchback", "llm_int8"):
        converted = copy.deepcopy(plain)
        convert_linears(converted, recipe)
        assert flops(converted) == expected


def test_fp8_quantizes_the_gradient_once() -> None:
    layer = LowpLinear(8, 8, recipe="fp8")
    y = layer(torch.randn(4, 8, requires_grad=True))
    with Counted("clipq::quantize_tensor") as counted:
        y.sum().backward()
    assert counted.calls == 2, "the gradient, for both products, and the input"


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
