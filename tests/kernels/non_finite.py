"""Not a number and infinity: what depends on them is not finite, and the rest is as without them.

Runs on plain torch from `test_reference.py`, on Triton as `against_reference.py` does.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import E4M3, E5M2, INT8, implementation, random

NAN, INF = float("nan"), float("inf")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPE = (7, 48)
BAD = 4

each_bad = pytest.mark.parametrize("bad", [NAN, INF, -INF])
each_type = pytest.mark.parametrize("dtype", (INT8,) if INTERPRETED else (INT8, E4M3, E5M2), ids=str)


@pytest.fixture
def kernels() -> SimpleNamespace:
    return implementation("triton")


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def with_bad_row(bad: float, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A clean matrix, and one with a single bad value in row `BAD`."""
    clean = random(*SHAPE, dtype=dtype, device=device)
    spoiled = clean.clone()
    spoiled[BAD, 11] = bad
    return clean, spoiled


def assert_only_row_is_bad(spoiled: Tensor, clean: Tensor) -> None:
    """Every element of the bad row is not finite; the other rows have the bits that they have without it."""
    others = [i for i in range(len(clean)) if i != BAD]
    assert torch.equal(spoiled[others], clean[others])
    assert clean.isfinite().all()
    assert not spoiled[BAD].isfinite().any(), "something turned finite"


def product(
    kernels: SimpleNamespace, q: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """With a weight that is quantized already; one of its rows is all zero."""
    weight = torch.ones(5, q.shape[1], device=q.device).to(q.dtype)
    weight[2] = 0
    return kernels.matmul(q, weight, scale, weight_scale, bias, None, torch.float32)


@each_bad
@each_type
@pytest.mark.parametrize("per_row", [False, True])
def test_a_row_of_the_input(kernels, device, bad, dtype, per_row) -> None:
    weight_scale = torch.rand(5 if per_row else 1, device=device)
    bias = torch.randn(5, device=device)
    clean, spoiled = (
        product(kernels, *kernels.quantize_rows(x, dtype, False)[:2], weight_scale, bias)
        for x in with_bad_row(bad, device)
    )
    assert_only_row_is_bad(spoiled, clean)


@each_bad
@each_type
def test_a_weight_with_one_scale(kernels, device, bad, dtype) -> None:
    x = random(*SHAPE, device=device)
    q, scale, _ = kernels.quantize_rows(x.abs() + 1, dtype, False)
    _, weight = with_bad_row(bad, device)
    w, wt, w_scale = kernels.quantize_tensor(weight, dtype)
    assert not w_scale.isfinite()
    out = kernels.matmul(q, w, scale, w_scale, None, None, torch.float32)
    assert not out.isfinite().any(), "something turned finite"
    g, g_scale, _ = kernels.quantize_rows(random(3, SHAPE[0], device=device).abs() + 1, dtype, False)
    gradient = kernels.matmul(g, wt.contiguous(), g_scale, w_scale, None, None, torch.float32)
    assert not gradient.isfinite().any(), "something turned finite"


@each_bad
@each_type
def test_a_column(kernels, device, bad, dtype) -> None:
    clean, spoiled = ((kernels.quantize_columns(x.T.contiguous(), dtype, None)) for x in with_bad_row(bad, device))
    outputs = [product(kernels, qt.contiguous(), scale, torch.ones(1, device=device)) for qt, scale in (spoiled, clean)]
    assert_only_row_is_bad(*outputs)


@each_bad
def test_stochastic_rounding(kernels, device, bad) -> None:
    seed = torch.tensor(5, device=device)
    clean, spoiled = (kernels.quantize_columns(x.T.contiguous(), INT8, seed) for x in with_bad_row(bad, device))
    assert_only_row_is_bad(spoiled[1][:, None], clean[1][:, None])
    others = [i for i in range(SHAPE[0]) if i != BAD]
    assert torch.equal(spoiled[0][others], clean[0][others])


@each_bad
def test_sums_of_columns(kernels, device, bad) -> None:
    clean, spoiled = (kernels.quantize_rows(x, INT8, True)[2] for x in with_bad_row(bad, device))
    assert not spoiled[11].isfinite()
    keep = torch.arange(SHAPE[1], device=device) != 11
    assert torch.equal(spoiled[keep], clean[keep])


@each_bad
@pytest.mark.parametrize("part", range(3))
def test_packed(kernels, device, bad, part) -> None:
    """A bad value in any of the three spoils its row's scale and its column's sum, and nothing else."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        parts = [random(*SHAPE, seed=s, device=device) for s in range(3)]
        parts[part] = x
        return kernels.pack_quantize_rows(*parts, INT8)

    clean, spoiled = (run(x) for x in with_bad_row(bad, device))
    assert_only_row_is_bad(spoiled[2][:, None], clean[2][:, None])
    column = part * SHAPE[1] + 11
    assert not spoiled[0][BAD, column].isfinite()
    assert not spoiled[3][column].isfinite()
    keep = torch.arange(3 * SHAPE[1], device=device) != column
    assert torch.equal(spoiled[3][keep], clean[3][keep])


@each_bad
@each_type
def test_dequantized(kernels, device, bad, dtype) -> None:
    """What `switchback_m` reads in its backward: q may be anything, but the product with its scale is not finite."""
    clean, spoiled = (kernels.quantize_rows(x, dtype, False) for x in with_bad_row(bad, device))
    outputs = [kernels.dequantize_rows(q, scale, torch.float32) for q, scale, _ in (spoiled, clean)]
    assert_only_row_is_bad(*outputs)


@each_bad
@each_type
def test_layer_norm(kernels, device, bad, dtype) -> None:
    weight, bias = torch.ones(SHAPE[1], device=device), torch.randn(SHAPE[1], device=device)
    outputs = [
        kernels.layer_norm_quantize(x, weight, bias, 1e-5, torch.float32, dtype, True)
        for x in with_bad_row(bad, device)
    ]
    clean, spoiled = outputs
    assert_only_row_is_bad(spoiled[0], clean[0])
    assert_only_row_is_bad(spoiled[2][:, None], clean[2][:, None])


@each_bad
@pytest.mark.parametrize("where", ["dy", "x", "residual"])
def test_layer_norm_backward(kernels, device, bad, where) -> None:
    weight, bias = torch.ones(SHAPE[1], device=device), torch.randn(SHAPE[1], device=device)

    def run(**bad_one: Tensor) -> tuple[Tensor, ...]:
        x, dy, residual = (bad_one.get(n, random(*SHAPE, device=device)) for n in ("x", "dy", "residual"))
        statistics = kernels.layer_norm_quantize(x, weight, bias, 1e-5, torch.float32, INT8, False)[3:]
        return kernels.layer_norm_backward(dy, x, weight, *statistics, residual, bias)

    clean, spoiled = (run(**{where: x}) for x in with_bad_row(bad, device))
    if where == "residual":
        assert not spoiled[0][BAD, 11].isfinite()
        return
    assert_only_row_is_bad(spoiled[0], clean[0])
    assert not spoiled[1][11].isfinite()
    assert where == "x" or not spoiled[2][11].isfinite()


@each_bad
@pytest.mark.parametrize("quick", [False, True])
def test_gelu(kernels, device, bad, quick) -> None:
    clean, spoiled = (kernels.gelu_quantize(x, quick, INT8, True) for x in with_bad_row(bad, device))
    assert not spoiled[0][BAD, 11].isfinite()
    assert_only_row_is_bad(spoiled[2][:, None], clean[2][:, None])


@each_bad
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("where", ["dy", "x"])
def test_gelu_backward(kernels, device, bad, quick, where) -> None:
    other = random(*SHAPE, seed=1, device=device) + 0.1
    clean, spoiled = (
        kernels.gelu_backward_quantize(*((v, other) if where == "dy" else (other, v)), quick, INT8, False)
        for v in with_bad_row(bad, device)
    )
    assert not spoiled[0][BAD, 11].isfinite()
    assert_only_row_is_bad(spoiled[2][:, None], clean[2][:, None])
    assert not spoiled[3][11].isfinite()
