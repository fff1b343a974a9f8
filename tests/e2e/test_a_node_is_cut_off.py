"""Two nodes under torchrun, with a c10d rendezvous on the first, and the network between them goes down.

Both trainers end. torchrun ends on the node of the rendezvous; on the other it waits for that by limits of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import children
from tests.lost_ranks import (
    LIMIT,
    TELLING,
    TwoNodes,
    ended,
    is_running,
    kill_all,
    log_of,
    settings,
    train_some_steps,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    try:
        with TwoNodes() as nodes:
            yield nodes
    except OSError as error:
        pytest.skip(f"no network namespaces here, which need root: {error}")


def test_a_node_is_cut_off(nodes: TwoNodes, world: Path) -> None:
    folder = world / "runs" / "cut"
    processes = [nodes.start(node, world, settings(world, "cut")) for node in (0, 1)]
    try:
        train_some_steps(folder, processes)
        trainers = [pid for process in processes for pid in children(process.pid)]
        assert len(trainers) == 2
        start = time.monotonic()
        nodes.cut()
        wait_for(lambda: not any(map(is_running, trainers)), "a trainer hangs", LIMIT + TELLING)
        print(f"ended after {time.monotonic() - start:.1f} s")
        assert 0 not in ended(processes[:1])[0]
        first, second = (log_of(folder, rank) for rank in (0, 1))
        assert "rank 1 (host node1) is silent, the last it said: it " in first
        assert "does not answer: rank 0, its host or the way to it is gone" in second
    finally:
        kill_all(processes)
