"""A low-precision linear layer against the paper's formulas in float64, and in every setting that training has."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from clipq.lowp import RECIPES, LowpLinear, convert_linears, get_recipe, linear
from tests.kernels.emulation import assert_near
from tests.unit.lowp.emulated_linear import LAYERS, emulate, snr
from tests.unit.lowp.towers import Counted

LOWP = [name for name in RECIPES if name != "bf16"]
each_recipe = pytest.mark.parametrize("name", LOWP)
BF16 = torch.bfloat16


def layer_of(name: str, n: int = 40, m: int = 24, *, bias: bool = True, dtype: torch.dtype | None = None) -> LowpLinear:
    torch.manual_seed(1)
    layer = LowpLinear(n, m, bias, recipe=get_recipe(name), dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
    return layer


def data(rows: int = 33, n: int = 40, m: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and output gradients, rows of different magnitudes and the fifth all zero."""
    g = torch.Generator().manual_seed(2)
    size = torch.rand(rows, 1, generator=g) * 10
    size[4:5] = 0
    return torch.randn(rows, n, generator=g) * size, torch.randn(rows, m, generator=g) * size.flip(0)


def run(
    layer: nn.Module, x: torch.Tensor, g: torch.Tensor, autocast: bool = False, **kwargs
) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of input, weight and bias (zero where there is none)."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = layer(x, **kwargs)
    y.backward(g.to(y.dtype))
    bias = layer.bias.grad if layer.bias is not None else torch.zeros(1)
    return y.detach(), x.grad, layer.weight.grad, bias


def test_every_recipe_has_an_emulation() -> None:
    assert {*LAYERS, "bf16", "int8_stochastic"} == set(RECIPES)


@pytest.mark.parametrize("kind", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_emulation(name, bias, kind) -> None:
    layer = layer_of(name, bias=bias, dtype=BF16 if kind == "bf16" else None)
    x, g = data()
    if kind == "bf16":
        x, g = x.to(BF16), g.to(BF16)
    found = run(layer, x, g, autocast=kind == "autocast")
    dtype = torch.float32 if kind == "fp32" else BF16
    assert found[0].dtype is dtype, "the output has autocast's type"
    assert [t.dtype for t in found[1:3]] == [x.dtype, layer.weight.dtype]
    exact = emulate(LAYERS[name], x, layer.weight, layer.bias, g, dtype)
    assert (exact[0].slack == 0).double().mean() > 0.3, "ties are the exception"
    for what, ours, expected in zip(("y", "dx", "dw", "db"), found, exact, strict=True):
        if what == "db" and not bias:
            continue
        assert_near(ours, expected.value, expected.magnitude, slack=expected.slack)


def test_16_bit_weights_and_inputs_of_another_type() -> None:
    """Frozen and mixed settings: bf16 weights under autocast with float32 inputs."""
    layer, (x, g) = layer_of("switchback", dtype=BF16), data()
    y, dx, dw, db = run(layer, x, g, autocast=True)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (BF16, torch.float32, BF16, BF16)


BANDS = {
    "llm_int8": (40, 40, 40),
    "switchback": (38, 38, 52),
    "switchback_m": (38, 38, 42.5),
    "switchback_r": (38, 38, 52),
    "switchback_q": (40, 40, 52),
    "fp8_sim": (28.5, 24.5, 24.5),
    "fp8": (28.5, 24.5, 24.5),
    "switchback_fp8_sim": (28.5, 24.5, 52),
    "switchback_fp8": (28.5, 24.5, 52),
    "int8_stochastic": (38, 38, 37),
}
"""dB of output, input gradient and weight gradient on Gaussian data."""


@each_recipe
def test_noise_is_that_of_the_recipe(name) -> None:
    """More noise is a wrong scale; less is a product that was not in low precision."""
    torch.manual_seed(0)
    layer = layer_of(name, 256, 192, bias=False)
    x, g = torch.randn(300, 256), torch.randn(300, 192)
    y, dx, dw, _ = run(layer, x, g, autocast=True)
    w = layer.weight.detach()
    for what, ours, exact, band in zip(
        ("y", "dx", "dw"), (y, dx, dw), (x @ w.T, g @ w, g.T @ x), BANDS[name], strict=True
    ):
        assert abs(snr(ours, exact) - band) < 1.5, f"{what}: {snr(ours, exact):.1f} dB, expected about {band}"


@each_recipe
def test_any_leading_shape_and_strides(name) -> None:
    layer = layer_of(name)
    x, _ = data(24)
    expected = layer(x)
    assert torch.equal(layer(x.view(2, 3, 4, 40)), expected.view(2, 3, 4, 24))
    assert torch.equal(layer(x[5]), layer(x[5:6])[0])
    assert torch.equal(layer(x.T.contiguous().T), expected)
    wide = torch.full((24, 47), 1e3)
    wide[:, 4:44] = x
    assert torch.equal(layer(wide[:, 4:44]), expected)
    leaf, dense = wide.requires_grad_(), x.clone().requires_grad_()
    g = torch.randn(6, 4, 24, generator=torch.Generator().manual_seed(1))
    for leading in (leaf[:, 4:44], dense):
        torch.manual_seed(0)  # of the recipe that rounds at random
        layer(leading.unflatten(0, (4, 6)).transpose(0, 1)).backward(g)
    assert torch.equal(leaf.grad[:, 4:44], dense.grad)
    assert not leaf.grad[:, :4].any()
    assert not leaf.grad[:, 44:].any()


@each_recipe
def test_gradient_with_other_strides(name) -> None:
    """A gradient that is expanded or transposed, as sums and transposes hand it back."""
    x, g = data(24)
    found = []
    for gradient in (g, g.T.contiguous().T):
        torch.manual_seed(0)
        found.append(run(layer_of(name), x, gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    torch.manual_seed(0)
    expanded = run(layer_of(name), x, torch.ones(1, 1).expand(24, 24))
    torch.manual_seed(0)
    for a, b in zip(expanded, run(layer_of(name), x, torch.ones(24, 24)), strict=True):
        assert torch.equal(a, b)


@each_recipe
@pytest.mark.parametrize("autocast", [False, True])
def test_no_tokens(name, autocast) -> None:
    layer = layer_of(name)
    y, dx, dw, db = run(layer, torch.zeros(0, 3, 40), torch.zeros(0, 3, 24), autocast)
    assert y.shape == (0, 3, 24)
    assert dx.shape == (0, 3, 40)
    assert dw.abs().sum() == db.abs().sum() == 0


@each_recipe
def test_all_zero_inputs_gradients_and_weights(name) -> None:
    layer = layer_of(name)
    y, dx, dw, _ = run(layer, torch.zeros(5, 40), torch.zeros(5, 24))
    torch.testing.assert_close(y, layer.bias.detach().expand(5, -1))
    assert dx.abs().sum() == dw.abs().sum() == 0
    nn.init.zeros_(layer.weight)
    x, g = data()
    y, dx, _, _ = run(layer, x, g)
    torch.testing.assert_close(y, layer.bias.detach().expand(len(x), -1))
    assert dx.abs().sum() == 0


@each_recipe
@pytest.mark.parametrize("autocast", [False, True])
def test_residual(name, autocast) -> None:
    x, g = data()
    residual = torch.randn(33, 24, requires_grad=True)
    torch.manual_seed(0)
    plain = run(layer_of(name), x, g, autocast)
    torch.manual_seed(0)
    y, *gradients = run(layer_of(name), x, g, autocast, residual=residual)
    assert y.dtype is torch.float32, "the output has the residual's type"
    off = (plain[0].float() + residual.detach() - y).abs()
    # under autocast the layer's own output is rounded to bfloat16, the one with the residual is not
    rounding = 2.0**-8 * plain[0].float().abs() if autocast else torch.zeros(())
    assert (off <= rounding + 2e-5).all()
    if autocast:
        assert off.max() > 1e-4, "rounded to 16 bits before the sum"
    assert torch.equal(residual.grad, g)
    if not autocast:
        layer = layer_of(name)
        assert torch.equal(layer(x[5], residual=residual[5]), layer(x[5:6], residual=residual[5:6])[0])
    for a, b in zip(gradients, plain[1:], strict=True):
        assert torch.equal(a, b)


@each_recipe
def test_without_gradients(name) -> None:
    layer, (x, _) = layer_of(name), data()
    expected = layer(x)
    assert expected.grad_fn is not None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(layer(x), expected)
            assert not layer(x).requires_grad


@each_recipe
def test_frozen_parts(name) -> None:
    """What is left has the same gradients, and no product is computed for what is frozen."""
    layer, (x, g) = layer_of(name), data()

    def gradients(input_too: bool) -> tuple[list[torch.Tensor | None], int]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_(input_too)
        torch.manual_seed(0)
        y = layer(leaf)
        with Counted("clipq::matmul") as low, Counted("clipq::matmul16") as high:
            y.backward(g)
        return [leaf.grad, layer.weight.grad, layer.bias.grad], low.calls + high.calls

    whole, products = gradients(True)
    assert products == 2
    for frozen in range(3):
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
        if frozen:
            [layer.weight, layer.bias][frozen - 1].requires_grad_(False)
        found, products = gradients(frozen != 0)
        assert products == (2 if frozen == 2 else 1)
        for i, (a, b) in enumerate(zip(found, whole, strict=True)):
            assert a is None if i == frozen else torch.equal(a, b)


def saved_by(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", BF16), hooks:
        layer(x.requires_grad_())
    return [t for t in saved if t.numel() == x.numel() and t.shape == x.shape]


@pytest.mark.parametrize(
    ("name", "types"),
    [("switchback", [BF16]), ("switchback_m", [torch.int8]), ("switchback_q", [BF16]), ("switchback_fp8", [BF16])],
)
def test_what_is_kept_of_the_input(name, types) -> None:
    assert [t.dtype for t in saved_by(layer_of(name), data()[0])] == types


def test_a_frozen_layer_keeps_nothing_of_it() -> None:
    layer = layer_of("switchback").requires_grad_(False)
    assert not saved_by(layer, data()[0])


@each_recipe
def test_saved_tensor_hooks_may_move_everything(name) -> None:
    x, g = data()
    torch.manual_seed(0)
    expected = run(layer_of(name), x, g)
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        found = run(layer_of(name), x, g)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@each_recipe
def test_a_row_that_is_not_finite_stays_so(name, bad) -> None:
    layer, (x, g) = layer_of(name), data()
    clean = layer(x)
    x[7, 3] = bad
    y, _, dw, _ = run(layer, x, g)
    assert not y[7].isfinite().any()
    if RECIPES[name].output.left.scales.value == "vector":
        assert torch.equal(y[:7], clean[:7])
        assert torch.equal(y[8:], clean[8:])
    assert not dw[:, 3].isfinite().any()
    x, _ = data()
    g[7, 3] = bad
    layer.zero_grad()
    _, dx, dw, db = run(layer, x, g)
    assert not dx[7].isfinite().any()
    assert not dw[3].isfinite().any()
    assert not db[3].isfinite()
    with torch.no_grad():
        layer.weight[2, 5] = bad
    y = layer(x + 1)
    assert (
        not y.isfinite().any() if RECIPES[name].output.right.scales.value == "tensor" else not y[:, 2].isfinite().any()
    )


def test_stochastic_rounding_follows_the_seed_and_keeps_the_mean() -> None:
    layer, (x, g) = layer_of("int8_stochastic"), data()

    def weight_gradient(seed: int) -> torch.Tensor:
        layer.zero_grad()
        torch.manual_seed(seed)
        return run(layer, x, g)[2].clone()

    assert torch.equal(weight_gradient(5), weight_gradient(5))
    assert not torch.equal(weight_gradient(5), weight_gradient(6))
    exact = g.double().T @ x.double()
    draws = torch.stack([weight_gradient(s).double() for s in range(150)])
    spread = draws.std(0) / 150**0.5
    assert ((draws.mean(0) - exact).abs() / (spread + 1e-6)).max() < 5.5
    # to the nearest, the error of every element would be the same in each draw
    assert (draws[0] - exact).norm() > 5 * (draws.mean(0) - exact).norm()


def test_fp8_formats_are_a_setting() -> None:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x, g = data()
    recipe = get_recipe("switchback_fp8").with_formats(forward=e5m2, grad=e4m3)
    layer = layer_of("switchback_fp8")
    layer.recipe = recipe
    found = run(layer, x, g)
    emulated = LAYERS["switchback_fp8"]._replace(x=(e5m2, 1), g=(e4m3, 1), w_output=(e5m2, None), w_input=(e5m2, None))
    for ours, expected in zip(found, emulate(emulated, x, layer.weight, layer.bias, g, torch.float32), strict=True):
        assert_near(ours, expected.value, expected.magnitude, slack=expected.slack)
    everywhere = get_recipe("fp8").with_formats(forward=e5m2, grad=e5m2)
    assert everywhere.dtypes == {e5m2}
    assert get_recipe("fp8_sim").with_formats(forward=e5m2, grad=e4m3).simulated
    with pytest.raises(ValueError, match="switchback is not of fp8"):
        get_recipe("switchback").with_formats(forward=e4m3, grad=e5m2)
    with pytest.raises(ValueError, match="int8: expected"):
        get_recipe("fp8").with_formats(forward=torch.int8, grad=e5m2)


def test_a_layer_is_a_linear_layer() -> None:
    layer = layer_of("switchback")
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert "recipe=switchback" in repr(layer)
    other = copy.deepcopy(layer)
    x, _ = data()
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.mul_(2)
    assert not torch.equal(other(x), layer(x))
    assert torch.equal(linear(x, layer.weight, layer.bias, get_recipe("switchback")), layer(x))


def test_a_plain_linear_layer_keeps_its_parameters_and_hooks() -> None:
    layer = nn.Sequential(nn.Linear(40, 24))
    weight, calls = layer[0].weight, []
    layer[0].register_forward_hook(lambda *_: calls.append(1))
    convert_linears(layer, "switchback")
    layer(data()[0])
    assert layer[0].weight is weight
    assert calls == [1]
