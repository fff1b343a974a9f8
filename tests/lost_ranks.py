"""What tests of ranks that hang or are gone share: a run of a tiny model without end, and how its processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers import steps_done

LIMIT = 5
"""Seconds that a step may take, and after which a rank is found to hang."""
TELLING = 20
"""Seconds in which a rank finds out who is behind, tells it and ends; on a machine that is busy."""
SECONDS = 60
"""That a run may take to begin."""


def settings(world: Path, name: str, *more: str) -> list[str]:
    return [
        *(f"model.name={world}/tiny.json", f"data.shards={world}/data/*.tar", "data.workers=1", "data.shuffle=16"),
        *("data.lanes=2", "batch_size=16", "steps=1000000", "schedule.warmup=5", "backend=fp32", "device=cpu"),
        *("log.every=5", "checkpoint.every=0", f"parallel.step_timeout_minutes={LIMIT / 60}", f"name={name}", *more),
    ]


def wait_for(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def train_some_steps(folder: Path, processes: list[subprocess.Popen]) -> None:
    def begun() -> bool:
        assert all(process.poll() is None for process in processes), "a rank ended before its time"
        return steps_done(folder) >= 20

    wait_for(begun, "the run did not begin")


def ended(processes: list[subprocess.Popen], seconds: float = LIMIT + TELLING) -> tuple[list[int], float]:
    """Exit statuses, and after how many seconds the last process ended; what is too slow fails the test."""
    start = time.monotonic()
    codes = [process.wait(timeout=max(0.1, start + seconds - time.monotonic())) for process in processes]
    return codes, time.monotonic() - start


def kill_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def log_of(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank_{rank}.log").read_text()
