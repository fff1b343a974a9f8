"""Settings of what is watched while a run trains, and of what happens when it goes bad."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from clipq.config.checks import require
from clipq.config.choices import GuardPolicy


@dataclass
class WatchConfig:
    rms: list[str] = field(default_factory=lambda: ["default"])
    """Parameters whose RMS_t goes into the metrics, as patterns of names (`visual.*`), or `default`: embeddings, logit
    scale, first and last blocks; [] for none. See docs/stability.md."""
    norms: bool = True
    """Norms of the same parameters, and of their updates."""
    features: bool = True
    """Mean magnitude of the output of every block of both towers, over an eighth of the batch."""
    every: int = 10
    """Steps between two that are watched. Loss, gradient norm and the largest logit are there at every step."""
    quantization: int = 1000
    """Steps between two at which the error of every layer in low precision is measured, on 8 pairs; 0 for never."""
    ignore: int = 1000
    """First steps of a run in which a high loss or RMS_t is no event: much of both is noise there."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"watch.every={self.every}: expected 1 or more steps; watch.rms=[] watches no RMS_t")
        require(self.quantization >= 0, f"watch.quantization={self.quantization}: expected 0 or more steps")
        require(self.ignore >= 0, f"watch.ignore={self.ignore}: expected 0 or more steps")


@dataclass
class GuardConfig:
    policy: GuardPolicy = GuardPolicy.stop
    """What follows a step whose loss or gradients are not finite, or whose loss rose too far. Its update is never made.
    `stop` ends the run, `skip` goes on with the next batch, `rewind` goes back to the newest checkpoint and leaves out
    the batches since."""
    rise: float | None = None
    """A loss so far above its running mean is too high; null for no bound. Holds after watch.ignore steps."""
    limit: int = 10
    """So many bad steps, or rewinds, end the run whatever the policy."""

    def __post_init__(self) -> None:
        require(
            self.rise is None or 0 < self.rise < math.inf,
            f"guard.rise={self.rise}: expected null, or how far above its mean a loss may lie, a positive number",
        )
        require(self.limit >= 1, f"guard.limit={self.limit}: expected 1 or more")
