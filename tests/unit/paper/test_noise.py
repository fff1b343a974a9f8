"""The study of quantization noise: roundings by hand, the derived line on data that keep to it and on data that do not,
and the whole on a model in training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipq.kernels.formats import QMAX
from clipq.kernels.quantize import reference
from clipq.lowp.recipe import E4M3, E5M2, INT8, Operand, Scales

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from paper import noise, noise_panels
from paper.rounding import KINDS, Kind, largest, place, rounded
from paper.rows import Rows, gaussian_rows, training_rows

CPU = torch.device("cpu")
FP8 = [E4M3, E5M2]


def every_value(dtype: torch.dtype) -> Tensor:
    """All finite values of an fp8 type, in order."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("dtype", FP8)
def test_place_is_between_the_neighbours_in_the_list_of_all_values(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    draw = torch.Generator().manual_seed(0)
    v = torch.cat((values, torch.randn(5000, generator=draw) * 10 ** (6 * torch.rand(5000, generator=draw) - 4)))
    v = v[v.abs() < QMAX[dtype]]
    outer = torch.searchsorted(values, v.abs(), right=True)
    found = place(v, dtype)
    assert torch.equal(found.inner.abs(), values[outer - 1])
    assert torch.equal(found.inner.abs() + found.step, values[outer])
    assert torch.equal(found.inner.abs() + found.way * found.step, v.abs())
    assert torch.equal(found.inner, found.inner.abs() * v.sign())


@pytest.mark.parametrize("dtype", [INT8, *FP8])
@pytest.mark.parametrize("value", [0.013, -0.3, 0.77, -0.9999, 1e-5, 1e-6])
def test_stochastic_rounding_keeps_the_mean_and_has_the_derived_variance(dtype: torch.dtype, value: float) -> None:
    count = 40000
    x = torch.full((count, 1), value)
    found = rounded(x, torch.ones(1), dtype, torch.tensor(7))
    variance = float(found.variances[0])
    error = found.values[:, 0] - x.double()[0]
    low, high = found.values.unique().tolist()
    assert low < value < high
    # a scale in float32 and its inverse do not multiply to 1 exactly
    assert abs(float(error.mean())) < 4 * math.sqrt(variance / count) + 1e-7 * abs(value)
    chance = variance / (high - low) ** 2  # f(1 - f)
    assert float(error.square().mean()) == pytest.approx(variance, rel=4 / math.sqrt(count * chance))


def test_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0], [0.3, 0.5], [0.0, 2.0]])
    nearest = rounded(x, torch.tensor([1.27, 2.54]), INT8, None)  # steps of 0.01 and of 0.02
    assert torch.allclose(nearest.values, torch.tensor([[1.0, -2.0], [0.3, 0.5], [0.0, 2.0]]).double(), atol=1e-6)
    assert torch.allclose(nearest.variances, torch.tensor([[1e-4, 4e-4], [1e-4, 4e-4], [0, 4e-4]]).double() / 12)
    # E5M2 has 1, 1.25, 1.5, 1.75, 2, 2.5: with a scale of 1, 1.3 is a fifth of the way up and 2.1 too
    scale_one = torch.tensor([QMAX[E5M2]])
    drawn = rounded(torch.tensor([[1.3], [2.1], [1.5]]), scale_one, E5M2, torch.tensor(1))
    expected = torch.tensor([0.25**2 * 0.2 * 0.8, 0.5**2 * 0.2 * 0.8, 0.0])
    assert torch.allclose(drawn.variances[:, 0].float(), expected, atol=1e-6)
    assert drawn.values[2, 0] == 1.5


def test_the_sum_by_hand() -> None:
    """Two rows and one column: measured, derived and squared of int8 with scales of 1 and 2 a step."""
    rows = Rows("", 2, (1, 1), 1, 0, CPU)
    rows.add(torch.tensor([[127.0], [10.4]]), torch.tensor([[254.0], [21.0]]))
    exact = noise.block_products(rows.g_bc, rows.x_bc, 2)
    found = noise.compare(rows, exact, slice(0, 2), KINDS["int8, a scale a column"], False)
    assert float(exact) == pytest.approx(127 * 254 + 10.4 * 21)
    assert float(found.errors) == pytest.approx(10 * 20 - 10.4 * 21, abs=1e-3)  # 10.4 -> 10, 21 is 10.5 steps -> 20
    v, w = 1 / 12, 4 / 12
    derived = 127**2 * w + 254**2 * v + v * w + 10.4**2 * w + 21**2 * v + v * w
    assert float(found.derived) == pytest.approx(derived, rel=1e-5)
    squared = 10.4**2 * 1**2 + 21**2 * 0.4**2 + 1**2 * 0.4**2
    assert float(found.squared) == pytest.approx(squared, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_scales_are_those_of_all_columns(kind: Kind) -> None:
    """Some columns with what is kept of the others quantize as in the whole matrix, by clipq's own quantizers."""
    whole = torch.randn(300, 40) * torch.rand(40)
    some = torch.tensor([3, 8, 39])
    for operand in kind:
        amax = largest(whole[:, some], whole.abs().amax(1), operand)
        found = rounded(whole[:, some], amax, operand.dtype, None).values
        if operand.scales is Scales.tensor:
            q, _, scale = reference.quantize_tensor(whole, operand.dtype)
        else:
            qt, scale = reference.quantize_columns(whole, operand.dtype, None)
            q = qt.T
        assert torch.allclose(found, (q.double() * scale)[:, some], rtol=1e-6)


@pytest.fixture(scope="module")
def control() -> dict[str, Any]:
    torch.manual_seed(0)
    return noise.measure(gaussian_rows(8192, (96, 64), 64, 0, CPU), block=256, stretches=8)


@pytest.mark.parametrize("setting", noise_panels.settings_of())
def test_gaussian_data_keep_to_the_line(control: dict[str, Any], setting: str) -> None:
    kind = control["kinds"][setting]
    own = noise_panels.quotients([control], setting)
    fixed = np.array(kind["fixed_measured"]) / np.array(kind["fixed_derived"])
    assert own.mean() == pytest.approx(1, abs=0.03)
    assert own == pytest.approx(1, abs=0.1)  # of the largest size there is one stretch: 4096 pairs that share columns
    assert fixed[:3] == pytest.approx(1, abs=0.03)
    assert noise_panels.quotients([control], setting, "squared") == pytest.approx(1, abs=0.05)


def test_the_error_of_gaussian_products_follows_from_their_steps(control: dict[str, Any]) -> None:
    last = control["kinds"]["int8, a scale a column, nearest"]["relative"][-1][0]
    # absmax over rms of 8192 normal numbers is about 3.9: steps of 3.9/127, and two operands
    assert last == pytest.approx(math.sqrt(2 / 12) * 3.9 / 127, rel=0.1)


def test_lost_values_bend_the_line_and_stochastic_rounding_straightens_it() -> None:
    """G of one large row and many small ones of the same sign: all small ones are lost, and the error is their sum."""
    torch.manual_seed(0)
    rows = Rows("", 2048, (64, 64), 64, 0, CPU)
    g = 0.001 * (1 + 0.1 * torch.randn(2048, 64))
    g[0] = 1.0
    rows.add(g, 1 + 0.1 * torch.randn(2048, 64))
    rows.weight_mn = torch.randn(64, 64)
    found = noise.measure(rows, block=256, stretches=4)
    nearest, drawn = (found["kinds"][f"int8, a scale a column, {r}"] for r in ("nearest", "stochastic"))
    assert nearest["lost"][0] == pytest.approx(2047 / 2048)
    assert nearest["kept"][-1][0] == pytest.approx(1 / 3.047, rel=0.05)  # 1 of 1 + 2047 · 0.001
    assert noise_panels.quotients([found], "int8, a scale a column, nearest")[0, -1] > 10
    _, (fixed,) = noise_panels.growths([found], "int8, a scale a column, nearest")
    assert fixed > 1.8
    assert drawn["kept"][-1] == pytest.approx([1] * 4, abs=0.02)
    assert noise_panels.quotients([found], "int8, a scale a column, stochastic")[0, -1] == pytest.approx(1, abs=0.3)


def settings(arch: Path, shards: Sequence[str]) -> list[str]:
    shown = [f"model.name={arch}", f"data.shards=[{','.join(shards)}]", "batch_size=16", "backend=fp32"]
    return [*shown, "data.workers=0", "device=cpu"]


def test_rows_are_what_weight_gradients_are_made_of(arch: Path, shards: list[str]) -> None:
    """With all columns of one batch, Gᵀ X is the gradient that the trainer finds; scaled, since a batch is a mean."""
    gradients: list[dict[str, Tensor]] = []
    original = noise.training_rows.__globals__["forward_backward"]

    def spy(run: Any, *batch: Tensor) -> Tensor:
        numbers = original(run, *batch)
        gradients.append({n: p.grad.clone() for n, p in run.state.model.named_parameters() if p.grad is not None})
        return numbers

    noise.training_rows.__globals__["forward_backward"] = spy
    try:
        found, facts = training_rows(settings(arch, shards), rows=16 * 5, columns=128, seed=0, device=CPU)
    finally:
        noise.training_rows.__globals__["forward_backward"] = original
    assert facts["batches"] == 1
    assert len(found) == 6
    for rows in found:
        gradient = gradients[0][f"{rows.name}.weight"]
        columns = rows.columns
        assert torch.allclose(rows.g_bc.T @ rows.x_bc, gradient[columns[0]][:, columns[1]], atol=1e-6)
        assert rows.whole is not None
        assert torch.equal(rows.g_max_b, rows.whole[0].abs().amax(1))


def test_a_study_of_a_model_at_its_start(arch: Path, shards: list[str]) -> None:
    found = noise.study(settings(arch, shards), rows=512, columns=16, block=64, stretches=2)
    assert json.loads(json.dumps(found)) == found
    assert found["settings"]["trained_steps"] == 0
    assert len(found["measured"]["real"]) == 6
    for panel in found["panels"]:
        assert {"title", "x", "y", "series", "levels", "events"} == set(panel)
        assert [e["x"] for e in panel["events"]][-1] == 256 * 257
        for series in panel["series"]:
            assert len(series["x"]) == len(series["y"]) > 0
            assert all(math.isfinite(v) for v in series["y"])
            if "low" in series:
                between = zip(series["low"], series["y"], series["high"], strict=True)
                assert all(low <= y * (1 + 1e-9) and y <= high * (1 + 1e-9) for low, y, high in between)
    table = found["table"]
    assert len(table["rows"]) == 2 * len(KINDS) * 2
    assert all(len(row) == len(table["columns"]) and all(isinstance(c, str) for c in row) for row in table["rows"])
    assert len(found["here"]) >= 6
    assert "Relative errors of the three products of the same layers" in found["here"][-2]
    assert not any("nan" in sentence for sentence in found["here"])


def test_the_paper_compares_13_to_51() -> None:
    smallest, largest_n, b = noise_panels.inner_dimensions()["ViT-H"]
    assert (smallest, largest_n) == (1280, 5120)
    assert (round(b / largest_n), round(b / smallest)) == (13, 51)


def test_operands_are_the_recipes() -> None:
    assert KINDS["fp8, one scale"] == (Operand(E5M2, Scales.tensor), Operand(E4M3, Scales.tensor))
