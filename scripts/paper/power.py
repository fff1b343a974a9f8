"""Power of a GPU's board while a run has it to itself."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import threading
import time
from pathlib import Path

EVERY = 250
"""Milliseconds between two readings."""


class Power:
    """Reads the board's power from now on; the mean is of the time in which the run wrote metrics.

    On a machine without nvidia-smi, or where it names no power, nothing is read.
    """

    def __init__(self, metrics: Path) -> None:
        self._metrics, self._size = metrics, 0
        self._wrote: list[float] = []
        self._read: list[tuple[float, float]] = []
        self._process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-i", gpu]
            self._process = subprocess.Popen([*query, f"-lms={EVERY}"], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._read.append((time.monotonic(), float(line)))
            except ValueError:  # [N/A]
                return

    def look(self) -> None:
        """Whether the run has written since the last look; to be called some times a second."""
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        if size > self._size:
            self._size = size
            self._wrote.append(time.monotonic())

    def stop(self) -> float | None:
        """Watts in the mean, None where nothing was read while the run trained."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if not self._wrote:
            return None
        watts = [w for at, w in self._read if self._wrote[0] <= at <= self._wrote[-1]]
        return statistics.mean(watts) if watts else None
