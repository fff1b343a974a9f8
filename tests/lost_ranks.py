"""What tests of ranks that hang or are gone share: a run of a tiny model without end, and how its processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.helpers import steps_done

LIMIT = 5
"""Seconds that a step may take, and after which a rank is found to hang."""
TELLING = 30
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


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def log_of(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank_{rank}.log").read_text()


class TwoNodes:
    """Two network namespaces, with names of hosts, and a link between them: as far as torchrun sees, two machines."""

    ADDRESSES = ("10.231.77.1", "10.231.77.2")

    def __init__(self) -> None:
        self._names = [f"clipq-{os.getpid()}-{n}" for n in (0, 1)]
        self._ends = [f"cq{os.getpid() % 10**9}{n}" for n in "ab"]  # of which the kernel takes 15 letters

    def __enter__(self) -> Self:
        """Raises: OSError where this is not possible, as without root."""
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._ends
            _ip("link", "add", first, "netns", self._names[0], "type", "veth", "peer", second, "netns", self._names[1])
            for name, end, address in zip(self._names, self._ends, self.ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                for link in (end, "lo"):
                    _ip("-n", name, "link", "set", link, "up")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, node: int, world: Path, settings: list[str]) -> subprocess.Popen:
        """torchrun on a node, with one process of the trainer; what they say goes to `world/node_N`."""
        address = self.ADDRESSES[node]
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"),
            *(f"--rdzv-endpoint={self.ADDRESSES[0]}:29400", f"--rdzv-conf=is_host={1 - node}", "--rdzv-id=clipq"),
            *(f"--local-addr={address}", "-m", "clipq.cli.train", *settings),
        ]
        named = ["sh", "-c", f'hostname node{node} && exec "$@"', "sh", *torchrun]
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self._ends[node]}
        with (world / f"node_{node}").open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._names[node], "unshare", "--uts", *named],
                cwd=world,
                env=os.environ | own,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut(self) -> None:
        _ip("-n", self._names[1], "link", "set", self._ends[1], "down")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
