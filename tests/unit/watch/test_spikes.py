"""The paper's rules on planted numbers."""

from __future__ import annotations

import json
import math
import random

import pytest

from clipq.watch.spikes import Event, LossSpike, RmsEvent, Rules, SpikeDetector, row_of

PATCH = "visual.conv1.weight"


def calm(count: int, *, seed: int = 0) -> list[float]:
    """Losses about 2 with a deviation of 0.1, without an outlier."""
    rng = random.Random(seed)
    return [2.0 + max(-0.25, min(0.25, rng.gauss(0, 0.1))) for _ in range(count)]


def events_of(
    losses: list[float],
    rises: dict[int, float] | None = None,
    rules: Rules = Rules(ignore=100),  # noqa: B008
) -> list[Event]:
    detector = SpikeDetector(rules)
    found: list[Event] = []
    for step, loss in enumerate(losses, start=1):
        found += detector.update(step, loss, {PATCH: (rises or {}).get(step, 1.0)})
    return found


def with_high(steps: list[int], value: float = 3.0) -> list[float]:
    losses = calm(400)
    for step in steps:
        losses[step - 1] = value
    return losses


def test_quiet_training_has_no_events() -> None:
    assert events_of(calm(1000)) == []


def test_a_spike_is_two_high_losses_within_ten_steps() -> None:
    assert events_of(with_high([200])) == []
    assert events_of(with_high([200, 211])) == []
    (spike,) = events_of(with_high([200, 210]))
    assert isinstance(spike, LossSpike)
    assert (spike.step, spike.loss, spike.leads) == (200, 3.0, {})
    assert spike.mean == pytest.approx(2.0, abs=0.05)
    assert spike.deviation == pytest.approx(0.1, abs=0.03)


def test_what_is_close_is_one_event() -> None:
    assert [e.step for e in events_of(with_high([200, 201, 205, 214, 222]))] == [200]
    assert [e.step for e in events_of(with_high([200, 201, 215, 216]))] == [200, 215]


def test_the_first_steps_do_not_count() -> None:
    assert events_of(with_high([50, 51]), {40: 9.0}) == []
    assert [e.step for e in events_of(with_high([100, 101, 102]))] == [101], "the bound itself is not counted"


def test_a_new_level_is_not_an_endless_spike() -> None:
    losses = calm(300) + [x + 1 for x in calm(600, seed=1)]
    found = events_of(losses)
    assert [e.step for e in found] == [301]
    detector = SpikeDetector(Rules(ignore=100))
    for step, loss in enumerate(losses, start=1):
        detector.update(step, loss, {})
    assert detector.mean == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(("lead", "announced"), [(0, False), (1, True), (8, True), (9, False)])
def test_a_rise_announces_the_spike_one_to_eight_steps_after(lead: int, announced: bool) -> None:
    rise, spike = sorted(events_of(with_high([200, 205]), {200 - lead: 2.3}), key=lambda e: isinstance(e, LossSpike))
    assert rise == RmsEvent(200 - lead, PATCH, 2.3)
    assert isinstance(spike, LossSpike)
    assert spike.leads == ({PATCH: lead} if announced else {})


def test_the_lead_is_that_of_the_first_step_of_the_rise() -> None:
    found = events_of(with_high([200, 210]), dict.fromkeys(range(194, 211), 5.0))
    assert [type(e) for e in found] == [RmsEvent, LossSpike]
    assert isinstance(found[1], LossSpike)
    assert found[1].leads == {PATCH: 6}


def test_a_bound_below_is_no_event_and_nan_is_none() -> None:
    losses = calm(400)
    losses[249] = losses[250] = math.nan
    losses[260] = losses[261] = math.inf
    assert events_of(losses, {200: 2.29, 210: math.nan}) == []


def test_state_goes_on_in_the_middle_of_a_spike() -> None:
    losses, rises = with_high([200, 207, 350, 351]), {196: 4.0}
    whole, part = events_of(losses, rises), []
    detector = SpikeDetector(Rules(ignore=100))
    for step, loss in enumerate(losses, start=1):
        state = json.loads(json.dumps(detector.state_dict()))
        detector = SpikeDetector(Rules(ignore=100))
        detector.load_state_dict(state)
        part += detector.update(step, loss, {PATCH: rises.get(step, 1.0)})
    assert part == whole
    assert len(whole) == 3


def test_rows() -> None:
    assert row_of(RmsEvent(5, PATCH, 2.5)) == {
        "kind": "event", "event": "rms event", "step": 5, "parameter": PATCH, "rms": 2.5,
    }  # fmt: skip
    assert row_of(LossSpike(7, 3.0, 2.0, 0.1, {PATCH: 2})) == {
        "kind": "event", "event": "loss spike", "step": 7, "loss": 3.0, "mean": 2.0, "deviation": 0.1,
        "leads": {PATCH: 2},
    }  # fmt: skip


def test_a_run_that_began_lower_is_held_against_what_it_has_become() -> None:
    """A pretrained model whose loss rises in warm-up and stays above its start."""
    losses = [0.5, *(loss - 1.2 for loss in calm(600))]
    assert events_of(losses) == []
    losses[400] = losses[402] = 5.0
    (spike,) = events_of(losses)
    assert isinstance(spike, LossSpike)
    assert spike.step == 401
    assert spike.mean == pytest.approx(0.8, abs=0.1)


def test_losses_that_were_all_the_same_may_change() -> None:
    detector = SpikeDetector(Rules(ignore=0))
    for step, loss in enumerate([2.0] * 200 + [2.5, 2.6] * 500, start=1):
        detector.update(step, loss, {})
    assert detector.mean == pytest.approx(2.55, abs=0.05)
