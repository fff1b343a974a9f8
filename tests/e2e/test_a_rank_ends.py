"""Two ranks, of which one cannot go on: both end within seconds, with the cause and without a traceback, and no process
is left; where a source ends on one rank, the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from clipq.data.order import Order
from tests.helpers import (
    children,
    colour_shards,
    command_on_two_ranks,
    read_metrics,
    start_ranks,
    steps_done,
    tiny_arch,
)

pytestmark = pytest.mark.slow

SHARDS, SECONDS = 16, 60
"""Shards, as many as lanes, and the time that any of the runs may take to end."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of which those are broken that rank 1 has first, and sound ones."""
    folder = tmp_path_factory.mktemp("world")
    names, order = colour_shards(folder / "half", [12] * SHARDS), Order(SHARDS, SHARDS, 0, 8)
    for lane in range(1, SHARDS, 2):
        shard = Path(names[order.visit(lane, 0).shard])
        shard.write_bytes(shard.read_bytes()[:3000])
    colour_shards(folder / "sound", [12] * SHARDS)
    tiny_arch(folder)
    return folder


def settings(world: Path, name: str, *more: str) -> list[str]:
    own = [f"name={name}", f"data.lanes={SHARDS}", "data.shuffle=8", "data.workers=1", *more]
    return [f"model.name={world}/tiny.json", "backend=fp32", "batch_size=8", "log.every=5", "schedule.warmup=5", *own]


def left(name: str) -> list[str]:
    """Processes of a run after ten seconds, in which those of a loader notice that they are alone."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if f"name={name}".encode() in words:
                found.append(str(path))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def logs(folder: Path) -> list[str]:
    return [(folder / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]


def ended(processes: list[subprocess.Popen]) -> list[int]:
    """Exit statuses; whatever is too slow is killed, and fails the test."""
    deadline = time.monotonic() + SECONDS
    try:
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


BROKEN = "shards could not be read, at last"


def test_the_data_of_one_rank_are_broken(world: Path) -> None:
    arguments = settings(world, "broken", f"data.shards={world}/half/*.tar", "steps=500")
    processes = start_ranks(world, arguments, 2)
    assert ended(processes) == [1, 1]
    output, (first, second) = (world / "output").read_text(), logs(world / "runs" / "broken")
    assert output.count("error: 8 of the last ") == 1
    assert "Traceback" not in output + first + second
    assert "this rank ends since another did: rank 1: 8 of the last " in first
    assert BROKEN in first
    assert BROKEN in second
    assert left("broken") == []


def test_the_data_of_one_rank_are_broken_under_torchrun(world: Path) -> None:
    begun = time.monotonic()
    done = command_on_two_ranks(
        "train", *settings(world, "torchrun", f"data.shards={world}/half/*.tar", "steps=500"), cwd=world
    )
    assert time.monotonic() - begun < SECONDS
    assert done.returncode == 1
    assert done.stderr.count("error: 8 of the last ") == 1, done.stderr
    assert "Traceback" not in "".join(logs(world / "runs" / "torchrun"))
    assert left("torchrun") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loader_process_of_one_rank_is_killed(rank: int, world: Path) -> None:
    name = f"killed_{rank}"
    arguments = settings(world, name, f"data.shards={world}/sound/*.tar", "steps=5000")
    folder = world / "runs" / name
    processes = start_ranks(world, arguments, 2)
    deadline = time.monotonic() + SECONDS
    while steps_done(folder) < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    (loader,) = children(processes[rank].pid)
    os.kill(loader, signal.SIGKILL)
    assert ended(processes) == [1, 1]
    own, other = logs(folder)[:: 1 - 2 * rank]
    assert own.count("ERROR") == 1
    assert f"a loader process ended without a word (DataLoader worker (pid(s) {loader})" in own
    assert "data.shuffle" in own
    assert "ERROR" not in other
    # the store, in which rank 1 looks for the cause, ends with rank 0 where torchrun does not have it
    assert ("since another did: rank 1: a loader process" if rank else "since another did: rank 0") in other
    assert "Traceback" not in own + other
    assert left(name) == []


def test_a_source_that_ends_on_one_rank_first(world: Path) -> None:
    """It has a shard, which 16 lanes share, of which four have no sample of it at all."""
    small, rest = f"{world}/sound/00000.tar", f"{world}/sound/{{00001..00015}}.tar"
    sources = f"{{small: {{shards: '{small}', passes: 1}}, rest: {{shards: '{rest}'}}}}"
    done = command_on_two_ranks(
        "train", *settings(world, "ends", "data=mix", f"data.sources={sources}", "steps=40"), cwd=world
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(world / "runs" / "ends")] == list(range(1, 41))
    assert left("ends") == []
