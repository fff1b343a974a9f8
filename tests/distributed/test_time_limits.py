from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from clipq.dist.env import distributed
from clipq.dist.shard import make_mesh
from tests.helpers import run_distributed


def _limits() -> None:
    with distributed("cpu", timeout_minutes=7) as env:
        mesh = make_mesh(env, replicas=2)
        groups = [dist.group.WORLD, *mesh.get_all_groups()]
        assert len(groups) == 3
        for group in groups:
            assert group is not None
            options = group._get_backend(torch.device("cpu")).options  # pyright: ignore
            assert options._timeout == timedelta(minutes=7)


def test_all_groups_of_a_run_have_its_limit() -> None:
    run_distributed(_limits, 4)
