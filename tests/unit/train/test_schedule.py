from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipq.train.schedule import Schedule

DECAYS = ("cosine", "constant", "constant_cooldown")


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    decay = draw(st.sampled_from(DECAYS))
    steps = draw(st.integers(1, 500))
    warmup = draw(st.integers(0, steps - 1))
    cooldown = draw(st.integers(1, steps - warmup)) if decay == "constant_cooldown" else 0
    return Schedule(decay, draw(st.floats(1e-6, 1)), steps, warmup, cooldown, draw(st.floats(0, 1)))


@given(schedules())
def test_shape_of_every_schedule(schedule: Schedule) -> None:
    rates = [schedule(step) for step in range(1, schedule.steps + 1)]
    assert all(0 < r <= schedule.peak * (1 + 1e-12) for r in rates) or schedule.final == 0
    warm = rates[: schedule.warmup]
    assert all(math.isclose(b - a, schedule.peak / schedule.warmup, rel_tol=1e-6) for a, b in pairwise(warm))
    after = rates[max(0, schedule.warmup - 1) :]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(after)), "falls or stays after the warm-up"
    if schedule.warmup:
        assert rates[schedule.warmup - 1] == pytest.approx(schedule.peak)


def test_cosine_is_the_cosine() -> None:
    schedule = Schedule("cosine", 2.0, steps=110, warmup=10)
    for step in (11, 60, 110):
        expected = 1 + math.cos(math.pi * (step - 1 - 10) / 100)  # a quarter of the way is step 36, half is step 61
        assert schedule(step) == pytest.approx(expected)
    assert schedule(61) == pytest.approx(1.0)


def test_cooldown_is_linear_over_its_last_steps() -> None:
    schedule = Schedule("constant_cooldown", 1.0, steps=100, cooldown=20, final=0.1)
    assert schedule(80) == 1.0
    assert [schedule(s) for s in (82, 92)] == pytest.approx([0.1 + 0.9 * 19 / 20, 0.1 + 0.9 * 9 / 20])
    assert schedule(101) == pytest.approx(0.1), "the step after the last would have the final rate"
