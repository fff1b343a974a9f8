"""Checkpoints by their names: which there are, and which are kept. `step_00001000` is that of step 1000."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

NAME = re.compile(r"step_(\d{8})")


def whole(names: Iterable[str]) -> list[str]:
    """Those of the names that are checkpoints', by step: not of one that is being written, removed or damaged."""
    return sorted(name for name in names if NAME.fullmatch(name))


def found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, by step."""
    return [folder / name for name in whole(path.name for path in folder.glob("step_*"))]


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a folder of checkpoints; None where there is none."""
    every = found(folder)
    return every[-1] if every else None


class Keep(NamedTuple):
    last: int
    """Newest checkpoints kept."""
    every: int
    """Checkpoints kept for good: those whose step is a multiple of it; 0 for none."""

    def superseded(self, names: Iterable[str]) -> list[str]:
        """Those of the names of checkpoints that are not to be kept."""
        old = whole(names)[: -self.last]
        return [name for name in old if not (self.every and int(name.removeprefix("step_")) % self.every == 0)]
