"""Blocks stay compiled under a wrapper: as many graphs as alone, and each block runs in one of them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from clipq.dist.env import DistEnv, distributed
from clipq.model.surgery import blocks
from tests.distributed.steps import run_in, take_steps, whole_batches
from tests.helpers import colour_shards, run_distributed, tiny_arch

BACKEND = ("backend=switchback", "backend.precision=fp32", "backend.compile=on")


class Counting:
    """A compiler that counts the graphs it is given, and how often they run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled = aot_eager(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run


def count(folder: Path, env: DistEnv, *parallel: str) -> tuple[int, int]:
    """Graphs of two steps, and runs of graphs in them."""
    torch._dynamo.reset()
    counting = Counting()
    with patch.object(torch, "compile", functools.partial(torch.compile, backend=counting)):
        run = run_in(folder, env, "-".join(parallel), *BACKEND, *parallel, "steps=2")
    take_steps(run, whole_batches(2))
    assert len(blocks(run.state.model)) == 3
    del run
    gc.collect()  # or threads of gloo outlive the group
    env.barrier()
    return counting.graphs, counting.runs


def on_rank(folder: str, expected: tuple[int, int], strategies: list[list[str]]) -> None:
    with distributed("cpu") as env:
        for parallel in strategies:
            assert count(Path(folder), env, *parallel) == expected, parallel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "strategies"),
    [(2, [["parallel=ddp"], ["parallel=fsdp"]]), (4, [["parallel=hsdp", "parallel.replicas=2"]])],
)
def test_no_graph_is_lost(world: int, strategies: list[list[str]], tmp_path: Path) -> None:
    colour_shards(tmp_path, [30, 30])
    tiny_arch(tmp_path)
    with distributed("cpu") as env:
        graphs, runs = count(tmp_path, env, "parallel=none")
    assert graphs >= 2, "a tower each"
    assert runs == 2 * 3, "every block in every step"
    run_distributed(on_rank, world, str(tmp_path), (graphs, runs), strategies)
