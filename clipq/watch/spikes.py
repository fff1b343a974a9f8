"""Finds loss spikes, and the rises of RMS_t that come before them, while a run trains or in its metrics afterwards.

The rules are those of Wortsman et al., https://arxiv.org/abs/2304.13013, appendix: RMS_t of 2.3 and more is an event; a
loss that is 3.2 running standard deviations above its running mean, twice within 10 steps, is a spike; what lies
within 10 steps of each other is one event; the first 1000 steps do not count. How the paper's mean runs is not known
to us: here it is exponential, over about 100 steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LEAST = 1e-6
"""Deviation that a loss is taken to have at least, as a share of its mean."""


@dataclass(frozen=True)
class Rules:
    ignore: int = 1000
    """Steps at the start of a run that count for nothing but the running mean."""
    rms: float = 2.3
    """RMS_t of an event, at least."""
    deviations: float = 3.2
    """Running standard deviations that a loss lies above its running mean."""
    within: int = 10
    """Steps within which it does so twice, and within which events are one."""
    lead: int = 8
    """A rise of RMS_t announces a loss spike at most so many steps ahead, and at least one."""
    horizon: int = 100
    """Steps that running mean and deviation reach back."""


@dataclass(frozen=True)
class RmsEvent:
    """RMS_t of one parameter rose to the bound."""

    step: int
    parameter: str
    rms: float
    name: str = field(default="rms event", init=False)


@dataclass(frozen=True)
class LossSpike:
    step: int
    """The first step of the spike; it is known at the second."""
    loss: float
    mean: float
    """Running mean before."""
    deviation: float
    """Running standard deviation before."""
    leads: dict[str, int]
    """For each parameter whose RMS_t was at the bound shortly before: how many steps before, at the most."""
    name: str = field(default="loss spike", init=False)


Event = RmsEvent | LossSpike


class SpikeDetector:
    """Takes the numbers of one step after another; what it keeps does not grow with their number."""

    def __init__(self, rules: Rules = Rules()) -> None:
        self.rules = rules
        self._mean, self._square, self._count = 0.0, 0.0, 0
        self._high: tuple[int, float, float, float] | None = None  # a first high loss, which waits for a second
        self._last_high = -math.inf
        self._spiking = False
        self._rises: dict[str, list[int]] = {}  # the latest steps at the bound

    @property
    def mean(self) -> float | None:
        """Running mean of the loss, once the steps that do not count are over."""
        return self._mean if self._count > self.rules.ignore else None

    def update(self, step: int, loss: float, rms: Mapping[str, float]) -> list[Event]:
        """Events that this step completes.

        Args:
            step: of the optimizer, from 1 on, rising.
            loss: of the whole batch.
            rms: RMS_t of the watched parameters; empty where the step was not watched.
        """
        return [*self._rms_events(step, rms), *self._loss_spikes(step, loss)]

    def _rms_events(self, step: int, rms: Mapping[str, float]) -> list[RmsEvent]:
        events = []
        for parameter, value in rms.items():
            if step <= self.rules.ignore or not value >= self.rules.rms:
                continue
            rises = self._rises.setdefault(parameter, [])
            if not rises or step - rises[-1] > self.rules.within:
                events.append(RmsEvent(step, parameter, value))
            # a spike may be told `within` steps after it began, and looks `lead` steps back from there
            kept = [s for s in rises if step - s <= self.rules.within + self.rules.lead]
            self._rises[parameter] = [*kept, step]
        return events

    def _loss_spikes(self, step: int, loss: float) -> list[LossSpike]:
        rules = self.rules
        mean, deviation = self._mean, math.sqrt(max(0.0, self._square - self._mean**2))
        # without a floor, losses that were all the same would bound what is learned to that same loss for ever
        bound = mean + rules.deviations * max(deviation, LEAST * abs(mean))
        if not math.isfinite(loss):
            return []
        high = self._count > 0 and loss > bound
        # A rise that stays is a new level, not a spike without an end: what the mean learns of it is bounded.
        self._learn(min(loss, bound) if high and self._count >= rules.horizon else loss)
        if not high or step <= rules.ignore:
            return []
        merged = step - self._last_high <= rules.within
        self._last_high = step
        if not merged:
            self._high, self._spiking = (step, loss, mean, deviation), False
            return []
        if self._spiking or self._high is None:
            return []
        self._spiking = True
        first, *numbers = self._high
        return [LossSpike(first, *numbers, leads=self._leads(first))]

    def _learn(self, loss: float) -> None:
        self._count += 1
        weight = max(1 / self._count, 1 / self.rules.horizon)
        self._mean += weight * (loss - self._mean)
        self._square += weight * (loss**2 - self._square)

    def _leads(self, step: int) -> dict[str, int]:
        leads = {}
        for parameter, rises in self._rises.items():
            before = [step - s for s in rises if 1 <= step - s <= self.rules.lead]
            if before:
                leads[parameter] = max(before)
        return leads

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the rules are not among them."""
        return {
            "mean": self._mean,
            "square": self._square,
            "count": self._count,
            "high": self._high,
            "last_high": self._last_high,
            "spiking": self._spiking,
            "rises": {name: list(steps) for name, steps in self._rises.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._square, self._count = state["mean"], state["square"], state["count"]
        self._high = None if state["high"] is None else tuple(state["high"])
        self._last_high, self._spiking = state["last_high"], state["spiking"]
        self._rises = {name: list(steps) for name, steps in state["rises"].items()}


def row_of(event: Event) -> dict[str, Any]:
    """The event as a row of metrics.jsonl."""
    values = dataclasses.asdict(event)
    return {"kind": "event", "step": values.pop("step"), "event": values.pop("name"), **values}
