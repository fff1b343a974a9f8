"""The plain torch implementations against float64, and what is not finite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clipq import kernels as operators
from tests.kernels import emulation
from tests.kernels.cases import INT8, LAYOUTS, LOWP, SHAPES, TALL, implementation, integers, laid_out, random
from tests.kernels.emulation import assert_near, assert_quantized
from tests.kernels.non_finite import *  # noqa: F403

each_type = pytest.mark.parametrize("dtype", LOWP, ids=str)
each_input = pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
shapes = pytest.mark.parametrize("shape", [*SHAPES, TALL], ids=str)


@pytest.fixture
def kernels() -> SimpleNamespace:
    return implementation("reference")


@pytest.fixture
def device() -> str:
    return "cpu"


@each_type
@each_input
@pytest.mark.parametrize("layout", LAYOUTS)
@shapes
def test_quantized_values_are_the_nearest(shape, layout, x_dtype, dtype) -> None:
    x = laid_out(random(*shape, dtype=x_dtype), layout)
    q, scale, sums = operators.quantize_rows(x, dtype, column_sums=True)
    assert_quantized(x, q, scale, 1)
    assert_near(sums, x.double().sum(0), x.double().abs().sum(0))
    assert operators.quantize_rows(x, dtype)[2].shape == (0,)
    q, qt, scale = operators.quantize_tensor(x, dtype)
    assert_quantized(x, q, scale, None)
    assert torch.equal(qt.double(), q.double().T)
    assert qt.stride(1) == 1
    assert qt.stride(0) % 16 == 0 or not qt.numel()
    qt, scale = operators.quantize_columns(x, dtype)
    assert_quantized(x, qt.T, scale, 0)
    assert qt.stride(1) == 1
    assert qt.stride(0) % 16 == 0 or not qt.numel()


@each_type
def test_zero_and_tiny_slices_are_zero_with_a_finite_scale(dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-31, -1e-38], [1e-29, 5e-30], [3e38, -3e38]])
    q, scale, _ = operators.quantize_rows(x, dtype)
    assert q[:2].float().abs().max() == 0
    assert scale[0] == 0
    assert scale.isfinite().all()
    back = operators.dequantize_rows(q, scale, torch.float32)
    torch.testing.assert_close(back[2:], x[2:], rtol=0.07, atol=0)


def test_every_low_precision_type_but_others_is_refused() -> None:
    with pytest.raises(ValueError, match="float16: expected one of"):
        operators.quantize_rows(torch.ones(1, 1), torch.float16)
    with pytest.raises(ValueError, match="for int8"):
        operators.quantize_columns(torch.ones(1, 1), torch.float8_e4m3fn, seed=torch.tensor(1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 65), (0, 5, 8), (64, 48, 1040)], ids=str)
def test_int8_sums_are_exact(shape) -> None:
    M, N, K = shape
    a, b = integers(M, K, seed=1), integers(N, K, seed=2)
    exact = a.long() @ b.long().T
    assert not exact.numel() or exact.abs().max() < 2**24
    out = operators.matmul(a, b, torch.ones(M), torch.ones(()), out_dtype=torch.float32)
    assert torch.equal(out.long(), exact)


@each_type
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("row", [False, True])
def test_product_with_its_epilogue(row, column, out, dtype) -> None:
    M, N, K = 17, 33, 129
    a, b = random(M, K, seed=1), random(N, K, seed=2)
    (qa, sa), (qb, sb) = (
        operators.quantize_rows(x, dtype)[:2] if vector else operators.quantize_tensor(x, dtype)[::2]
        for x, vector in ((a, row), (b, column))
    )
    bias, residual = random(N, seed=3, dtype=torch.bfloat16), random(M, N, seed=4, dtype=out)
    result = operators.matmul(qa, qb, sa, sb, bias=bias, residual=residual, out_dtype=out)
    left, right = (emulation.fake_quantize(x, dtype, 1 if v else None) for x, v in ((a, row), (b, column)))
    exact = left @ right.T + bias.double() + residual.double()
    magnitude = left.abs() @ right.abs().T + bias.double().abs() + residual.double().abs()
    assert_near(result, exact, magnitude)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(3, 5, dtype=INT8)}, "same inner"),
        ({"b": torch.ones(3, 4).to(torch.float8_e5m2)}, "both int8 or both fp8"),
        ({"a_scale": torch.ones(3)}, "a_scale has 3 elements"),
        ({"bias": torch.ones(2)}, r"expected \(3,\)"),
        ({"residual": torch.ones(2, 3, dtype=torch.float16)}, r"expected \(2, 3\) and torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    fitting = {
        "a": torch.ones(2, 4, dtype=INT8),
        "b": torch.ones(3, 4, dtype=INT8),
        "a_scale": torch.ones(2),
        "b_scale": torch.ones(()),
    }
    operators.matmul(**fitting, out_dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        operators.matmul(**(fitting | change), out_dtype=torch.float32)


@each_input
@shapes
def test_layer_norm_and_its_gradient(shape, x_dtype) -> None:
    x, dy, residual = (random(*shape, seed=s, dtype=x_dtype) for s in range(3))
    weight, bias = (torch.randn(shape[1], dtype=x_dtype) for _ in range(2))
    y, q, scale, mean, rstd = operators.layer_norm_quantize(
        x, weight, bias, 1e-3, out_dtype=x_dtype, dtype=INT8, keep=True
    )
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = emulation.layer_norm(*leaves, 1e-3)
    size = exact.detach().abs() + bias.double().abs() + 1
    assert_near(y, exact.detach(), size * (x.double().abs().amax(1, keepdim=True) * rstd.double()[:, None] + 1))
    assert_quantized(y, q, scale, 1)
    again = operators.layer_norm_quantize(x, weight, bias, 1e-3, out_dtype=x_dtype, dtype=INT8, keep=False)
    assert again[0].shape == (0,)
    assert torch.equal(again[1], q)

    exact.backward(dy.double())
    dx, dw, db, nothing = operators.layer_norm_backward(dy, x, weight, mean, rstd, residual)
    assert nothing.shape == (0,)
    terms = dy.double().abs() * weight.double().abs() * rstd.double()[:, None]
    limit = 10 * terms.amax(1, keepdim=True) * (1 + x.double().abs() * rstd.double()[:, None]) if x.numel() else terms
    assert_near(dx, leaves[0].grad + residual.double(), limit + residual.double().abs())
    normed = ((x.double() - mean.double()[:, None]) * rstd.double()[:, None]).abs()
    assert_near(dw, leaves[1].grad, (dy.double().abs() * (normed + 1)).sum(0))
    assert_near(db, leaves[2].grad, dy.double().abs().sum(0))
    plain = operators.layer_norm_backward(dy, x, weight, mean, rstd)[0]
    assert_near(plain, leaves[0].grad, limit)
    recomputed = operators.layer_norm_backward(dy, x, weight, mean, rstd, residual, bias=bias)
    assert torch.equal(recomputed[0], dx)
    assert torch.equal(recomputed[3], y.to(dy.dtype))


@each_input
@pytest.mark.parametrize("quick", [False, True])
@shapes
def test_gelu_and_its_gradient(shape, quick, x_dtype) -> None:
    x, dy = (random(*shape, seed=s, dtype=x_dtype) for s in range(2))
    y, q, scale = operators.gelu_quantize(x, quick=quick, dtype=INT8, keep=True)
    leaf = x.double().requires_grad_()
    exact = emulation.gelu(leaf, quick)
    assert_near(y, exact.detach(), x.double().abs(), tolerance=1e-6)
    assert_quantized(y, q, scale, 1)
    assert torch.equal(operators.gelu_quantize(x, quick=quick, dtype=INT8, keep=False)[1], q)
    exact.backward(dy.double())
    dx, q, scale, sums, nothing = operators.gelu_backward_quantize(dy, x, quick=quick, dtype=INT8)
    assert nothing.shape == (0,)
    assert torch.equal(operators.gelu_backward_quantize(dy, x, quick=quick, dtype=INT8, keep=True)[4], y)
    assert_near(dx, leaf.grad, dy.double().abs())
    assert_quantized(dx, q, scale, 1)
    assert_near(sums, dx.double().sum(0), dx.double().abs().sum(0))


def test_autocast_changes_nothing_inside() -> None:
    a, b = random(5, 16).to(torch.float8_e4m3fn), random(6, 16).to(torch.float8_e4m3fn)
    plain = operators.matmul(a, b, torch.ones(5), torch.ones(()), out_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operators.matmul(a, b, torch.ones(5), torch.ones(()), out_dtype=torch.float32), plain)
        assert operators.matmul16(random(4, 3), random(3, 2)).dtype is torch.float32
