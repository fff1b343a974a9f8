"""Learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine, constant, or constant with a linear cooldown."""

    decay: str
    """cosine, constant or constant_cooldown."""
    peak: float
    """Learning rate at the end of the warm-up."""
    steps: int
    """Steps of the whole run."""
    warmup: int = 0
    cooldown: int = 0
    final: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __call__(self, step: int) -> float:
        """Learning rate of a step, counted from 1.

        The last step of the warm-up has the peak; a step after the last would have the final rate.
        """
        if step <= self.warmup:
            return self.peak * step / self.warmup
        done = step - 1
        if self.decay == "cosine":
            share = (done - self.warmup) / max(1, self.steps - self.warmup)
            factor = (1 + math.cos(math.pi * share)) / 2
        elif self.decay == "constant_cooldown":
            factor = min(1.0, (self.steps - done) / self.cooldown)
        else:
            factor = 1.0
        return self.peak * (self.final + (1 - self.final) * factor)
