"""Layers that are copied, compiled, parametrized, or given another weight; and who computes their products."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipq import kernels
from clipq.build_backend import speed_table
from clipq.lowp import RECIPES, LinearRecipe, LowpLinear, Operand, Product, Scales, convert_linears, quantized_once
from clipq.lowp import measure as measuring
from clipq.lowp.linear import linear
from clipq.lowp.speed import Speed, SpeedTable
from tests.unit.lowp.towers import Counted

CPU = torch.device("cpu")


def test_copies_of_compiled_layers_have_weights_of_their_own() -> None:
    layer = LowpLinear(16, 8, recipe="switchback")
    layer.compile(backend="eager")
    x = torch.randn(4, 16)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        y = other(x)
        assert not y.any()
        y.sum().backward()
        assert other.weight.grad is not None
        assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("name", "products"),
    [("fp8", 3), ("switchback_fp8", 2), ("fp8_sim", 0), ("switchback_fp8_sim", 0), ("switchback", 2), ("llm_int8", 3)],
)
def test_what_multiplies(name: str, products: int) -> None:
    """The low-precision product for real recipes, 16 bits for simulated ones: their results are too near to tell."""
    layer, x = LowpLinear(16, 8, recipe=name), torch.randn(4, 16, requires_grad=True)
    with Counted("clipq::matmul") as real, Counted("clipq::matmul16") as wide:
        layer(x).sum().backward()
    assert (real.calls, wide.calls) == (products, 3 - products)


def test_a_weight_made_at_random_is_made_once() -> None:
    class DropConnect(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.rand_like(weight) < 0.5)

    layer = LowpLinear(64, 64, bias=False, recipe="switchback")
    with torch.no_grad():
        layer.weight.fill_(1)
    parametrize.register_parametrization(layer, "weight", DropConnect())
    y = layer(torch.eye(64))
    y.sum().backward()
    kept = y.T > 0.5
    trained = layer.parametrizations.weight.original.grad != 0  # pyright: ignore
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal(kept, trained)


def test_a_weight_that_is_replaced_is_found() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    convert_linears(model, "switchback")
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0\.weight .* changed inside of quantized_once"), quantized_once(model):
        model.load_state_dict(doubled, assign=True)


def test_an_optimizer_without_gradients_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    convert_linears(model, "switchback")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with quantized_once(model):
        optimizer.step()
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="changed inside of quantized_once"), quantized_once(model):
        optimizer.step()


def test_operators_have_no_gradients() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    q, scale, _ = kernels.quantize_rows(x, torch.int8)
    assert not scale.requires_grad
    wide = kernels.matmul16(x, torch.randn(8, 8))
    assert not wide.requires_grad
    assert q.dtype is torch.int8


def test_recipes_that_name_no_low_precision() -> None:
    wide = Product(Operand(torch.bfloat16, Scales.vector), Operand(torch.bfloat16, Scales.tensor))
    with pytest.raises(ValueError, match=r"output multiplies torch\.bfloat16 .* None is a product of 16 bits"):
        LinearRecipe("mine", output=wide, grad_input=wide)
    with pytest.raises(ValueError, match="recipe bf16 is not of fp8"):
        RECIPES["bf16"].with_formats(forward=torch.float8_e4m3fn, grad=torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"recipe \['switchback'\]: expected one of"):
        convert_linears(nn.Linear(4, 4), ["switchback"])  # pyright: ignore


def test_names_are_recipes_everywhere() -> None:
    x, plain = torch.randn(4, 8), nn.Linear(8, 8)
    expected = linear(x, plain.weight, None, RECIPES["switchback"])
    assert torch.equal(linear(x, plain.weight, None, "switchback"), expected)
    assert LowpLinear.from_linear(plain, "switchback").recipe is RECIPES["switchback"]


def test_a_filter_that_fails_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def fails(name: str, _: nn.Linear) -> bool:
        return name == "0" or bool(1 / 0)

    with pytest.raises(ZeroDivisionError):
        convert_linears(model, "switchback", filter=fails)
    assert not any(isinstance(m, LowpLinear) for m in model)


def test_types_are_those_of_a_plain_layer() -> None:
    for recipe in ("switchback", "fp8_sim"):
        low = LowpLinear(8, 8, recipe=recipe)
        with pytest.raises(TypeError, match=r"input of torch\.bfloat16, weight of torch\.float32, and no autocast"):
            low(torch.randn(2, 8, dtype=torch.bfloat16))
        for layer in (low.double(), nn.Linear(8, 8).double()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(torch.randn(2, 8).double()).dtype is torch.float64


def test_recipes_that_a_gpu_cannot_compute_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    assert set(measuring.computable("cuda")) == {n for n in measuring.MEASURED if "fp8" not in n}
    assert "switchback_fp8 is left out: NVIDIA A100" in capsys.readouterr().out


def test_what_a_table_does_not_tell(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    SpeedTable("NVIDIA A100", (Speed("switchback", 512, 2048, 4096, 0.99),)).write(tmp_path / "table.json")
    table = speed_table(str(tmp_path / "table.json"), "switchback", CPU)
    assert table is not None
    assert table.why_slower("switchback", 512, 2048, 4096) is None, "within what measurements differ by"
    assert "its speeds are those of NVIDIA A100, and this is the CPU" in caplog.text
    assert "was not measured" not in caplog.text
    with caplog.at_level(logging.WARNING):
        speed_table(str(tmp_path / "table.json"), "llm_int8", CPU)
    assert "llm_int8 was not measured on NVIDIA A100, so every layer is converted" in caplog.text
