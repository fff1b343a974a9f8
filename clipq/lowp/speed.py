"""Where low precision pays: speeds of residual blocks, measured on one kind of GPU by `measure.py`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

TABLES = Path(__file__).parent / "tables"
"""Tables that come with clipq, a file for each GPU."""


AS_FAST = 0.98
"""From this ratio on low precision counts as no slower: measurements differ by as much."""


@dataclass(frozen=True)
class Speed:
    """One measurement: forward and backward of the norms, linear layers and activation of a block."""

    recipe: str
    width: int
    hidden: int
    """Hidden width of the MLP."""
    tokens: int
    """Rows of the products: images × patches, or texts × context."""
    ratio: float
    """Time in compiled bf16 / time by the recipe."""

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot have been measured."""
        if not min(self.width, self.hidden, self.tokens, self.ratio) > 0:
            raise ValueError(f"{self}: expected positive sizes and a positive ratio")


@dataclass(frozen=True)
class SpeedTable:
    """Measurements on one kind of GPU."""

    device: str
    speeds: tuple[Speed, ...]

    def nearest(self, recipe: str, width: int, hidden: int, tokens: int) -> Speed | None:
        """The measurement of the recipe whose sizes differ least, as ratios; None if it was not measured at all."""

        def distance(speed: Speed) -> float:
            pairs = ((speed.width, width), (speed.hidden, hidden), (speed.tokens, max(1, tokens)))
            return sum(abs(math.log(a / b)) for a, b in pairs)

        return min((s for s in self.speeds if s.recipe == recipe), key=distance, default=None)

    def why_slower(self, recipe: str, width: int, hidden: int, tokens: int) -> str | None:
        """Why a block of this size should stay in 16 bits; None where low precision is as fast or was not measured."""
        speed = self.nearest(recipe, width, hidden, tokens)
        if speed is None or speed.ratio >= AS_FAST:
            return None
        return (
            f"on {self.device} a block of width {speed.width} and {speed.hidden} with {speed.tokens:,} tokens is "
            f"×{speed.ratio:.2f} as fast by {recipe} as in bf16"
        )

    def write(self, path: Path) -> None:
        content = {"device": self.device, "speeds": [asdict(s) for s in self.speeds]}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_table(path: Path) -> SpeedTable:
    """A table from its file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return SpeedTable(content["device"], tuple(Speed(**row) for row in content["speeds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a table made by python -m clipq.lowp.measure ({error})") from error


def shipped_table(device: str) -> SpeedTable | None:
    """The table that comes with clipq for a GPU, by the name that `torch.cuda.get_device_name` gives; None if none."""
    path = TABLES / f"{re.sub('[^a-z0-9]+', '_', device.lower())}.json"
    return read_table(path) if path.exists() else None
