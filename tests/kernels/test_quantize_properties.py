"""For any matrix: how far quantization may be off, and that stochastic rounding keeps the mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq.kernels import dequantize_rows, quantize_columns, quantize_rows, quantize_tensor

quickly = settings(max_examples=60, deadline=None)
values = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)
FP8 = {torch.float8_e4m3fn: (2.0**-4, 2.0**-10), torch.float8_e5m2: (2.0**-3, 2.0**-17)}
"""Largest relative error of a rounding, and largest absolute one among subnormal numbers, in units of the scale."""


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    flat = draw(st.lists(values, min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(flat, dtype=torch.float32).view(rows, cols)


def check(x: torch.Tensor, back: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    error, scale = (x.double() - back).abs(), scale.double()
    if dtype is torch.int8:
        allowed = scale / 2 * (1 + 1e-5)
    else:
        relative, absolute = FP8[dtype]
        allowed = torch.maximum(x.double().abs() * relative, absolute * scale) * (1 + 1e-5)
    assert (error <= allowed + 1.01e-30).all()


@quickly
@given(matrices(), st.sampled_from([torch.int8, *FP8]))
def test_error_is_at_most_half_a_step(x, dtype) -> None:
    q, scale, _ = quantize_rows(x, dtype)
    check(x, q.double() * scale.double()[:, None], scale[:, None], dtype)
    q, _, scale = quantize_tensor(x, dtype)
    check(x, q.double() * scale.double(), scale, dtype)
    qt, scale = quantize_columns(x, dtype)
    check(x, (qt.double() * scale.double()[:, None]).T, scale, dtype)


@quickly
@given(matrices(), st.sampled_from([torch.int8, *FP8]), st.integers(-60, 60))
def test_powers_of_two_change_only_the_scale(x, dtype, exponent) -> None:
    x = torch.where(x.abs() < 1e-8, 0.0, x).clamp(-1e8, 1e8)
    q, scale, _ = quantize_rows(x, dtype)
    shifted_q, shifted, _ = quantize_rows(x * 2.0**exponent, dtype)
    assert torch.equal(q.double(), shifted_q.double())
    assert torch.equal(shifted, scale * 2.0**exponent)


@quickly
@given(matrices(), st.sampled_from([torch.int8, *FP8]))
def test_quantizing_twice_changes_nothing(x, dtype) -> None:
    x = torch.where(x.abs() < 1e-25, 0.0, x)
    q, scale, _ = quantize_rows(x, dtype)
    again, _, _ = quantize_rows(dequantize_rows(q, scale, torch.float32), dtype)
    assert torch.equal(again.double(), q.double())


@quickly
@given(matrices(), st.integers(0, 2**31 - 1))
def test_stochastic_rounding_takes_a_neighbour(x, seed) -> None:
    qt, scale = quantize_columns(x, torch.int8, seed=torch.tensor(seed))
    exact = torch.where(scale > 1e-32, x.double() / scale.double().clamp(min=1e-300), 0.0)
    assert ((qt.T.double() - exact).abs() <= 1 + 1e-4).all()
    assert qt.abs().int().max() <= 127
    again, _ = quantize_columns(x, torch.int8, seed=torch.tensor(seed))
    assert torch.equal(again, qt)


@pytest.mark.parametrize("first_seed", [0, 1 << 30])
def test_stochastic_rounding_keeps_the_mean(first_seed) -> None:
    """Over seeds and over positions: sums of thousands of roundings stay within five standard deviations."""
    x = torch.rand(64, 5, generator=torch.Generator().manual_seed(1)) * 20 - 10
    x[0] = 127.0  # scales of one
    seeds = 400
    drawn = torch.stack(
        [quantize_columns(x, torch.int8, seed=torch.tensor(first_seed + 977 * s))[0].T.double() for s in range(seeds)]
    )
    part = x.double() - x.double().floor()
    deviation = (part * (1 - part)).sqrt()
    off = (drawn.mean(0) - x.double()).abs() / (deviation / seeds**0.5 + 1e-4)
    assert off.max() < 5, "biased at a position"
    off = (drawn - x.double()).mean((1, 2)).abs() / (deviation.square().sum().sqrt() / x.numel())
    assert off.max() < 5, "biased for a seed"
    assert drawn.std(0)[1:].mean() > 0.3, "not random"
