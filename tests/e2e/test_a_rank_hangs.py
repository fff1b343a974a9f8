"""Ranks of which one hangs, or is killed: the others end within the limit, and say which one it was."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import children, start_ranks
from tests.lost_ranks import LIMIT, TELLING, ended, kill_all, log_of, settings, train_some_steps

pytestmark = pytest.mark.slow

Ranks = tuple[Path, list[subprocess.Popen]]


@pytest.fixture
def ranks(world: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """The folder of a run, in its steps, and its two ranks."""
    name = request.node.name.replace("[", "_").rstrip("]")
    processes = start_ranks(world, settings(world, name), 2)
    try:
        train_some_steps(world / "runs" / name, processes)
        yield world / "runs" / name, processes
    finally:
        kill_all(processes)


def test_a_rank_is_stopped(ranks: Ranks, world: Path) -> None:
    folder, (first, second) = ranks
    os.kill(second.pid, signal.SIGSTOP)
    codes, seconds = ended([first])
    print(f"noticed after {seconds:.1f} s")
    said = log_of(folder, 0)
    assert codes == [1]
    assert seconds > LIMIT
    assert "rank 1 (host " in said
    assert ") is silent, the last it said: it " in said
    assert "loop.py" in said, "no stack"
    assert "rank 1 (host " in (world / "output").read_text()
    os.kill(second.pid, signal.SIGCONT)
    assert ended([second])[0] == [1]


def test_the_rank_with_the_store_is_stopped(ranks: Ranks) -> None:
    folder, (first, second) = ranks
    os.kill(first.pid, signal.SIGSTOP)
    codes, seconds = ended([second])
    print(f"noticed after {seconds:.1f} s")
    assert codes == [1]
    assert "does not answer: rank 0, its host or the way to it is gone" in log_of(folder, 1)


def test_the_data_of_a_rank_hang(ranks: Ranks, world: Path) -> None:
    """Both ranks are alive: each leaves its stacks."""
    folder, processes = ranks
    (loader,) = children(processes[1].pid)
    os.kill(loader, signal.SIGSTOP)
    codes, seconds = ended(processes)
    print(f"noticed after {seconds:.1f} s")
    assert codes == [1, 1]
    assert "rank 1 (host " in log_of(folder, 0)
    for rank in range(2):
        assert "loop.py" in log_of(folder, rank), f"rank {rank} left no stack"
    assert "waits for the data of step" in log_of(folder, 0)
    os.kill(loader, signal.SIGKILL)


@pytest.mark.parametrize(
    ("killed", "told"),
    [(1, "lost another rank: rank 1 (host "), (0, "rank 0 is gone")],
    ids=["another", "the_one_with_the_store"],
)
def test_a_rank_is_killed(killed: int, told: str, ranks: Ranks) -> None:
    folder, processes = ranks
    processes[killed].kill()
    codes, seconds = ended([processes[1 - killed]], TELLING)
    print(f"noticed after {seconds:.1f} s")
    assert codes == [1]
    assert told in log_of(folder, 1 - killed)
