"""Runs on the cluster: their settings, and a way to hold one in its midst."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from pathlib import Path

from tests.cluster.cluster import Cluster, wait_for
from tests.helpers import steps_done

STEPS = 60


def settings(world: Path, name: str, *more: str) -> list[str]:
    return [
        *(f"model.name={world}/tiny.json", f"data.shards={world}/data/*.tar", "data.workers=1", "data.shuffle=16"),
        *("data.lanes=2", "batch_size=16", f"steps={STEPS}", "schedule.warmup=5", "optim.lr=1e-3", "backend=fp32"),
        *("device=cpu", "log.every=7", "checkpoint.every=0", f"name={name}", *more),
    ]


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("*"))


class Held:
    """The processes of a run, which stand still in its midst: a signal finds it there, however fast it trains."""

    def __init__(self, cluster: Cluster, job: str, name: str) -> None:
        self.folder = cluster.world / "runs" / name
        wait_for(lambda: steps_done(self.folder) >= 7, lambda: f"{name} does not begin\n{cluster.log(job)}")
        self.processes = [int(p.name) for p in Path("/proc").glob("[0-9]*") if _run_of(p) == name]
        for process in self.processes:
            os.kill(process, signal.SIGSTOP)

    def go_on(self, number: signal.Signals) -> None:
        """Lets them go on, as soon as the signal has come to both ranks."""
        asked = functools.partial(_has_got, number)
        wait_for(lambda: sum(map(asked, self.processes)) >= 2, lambda: f"no {number.name} comes")
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def _has_got(number: signal.Signals, process: int) -> bool:
    """Whether the signal waits for a process that stands still. Some ways of SLURM to send one let it go on too."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    state, pending = (status.split(f"\n{name}:")[1].split()[0] for name in ("State", "ShdPnd"))
    return state != "T" or bool(int(pending, 16) & 1 << (number - 1))


def _run_of(process: Path) -> str | None:
    """The name of the run that a process belongs to, if it is one of a trainer."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return None
    names = [word.removeprefix("name=") for word in words if word.startswith("name=")]
    return names[-1] if names and words[1:3] == ["-m", "clipq.cli.train"] else None  # the last override counts
