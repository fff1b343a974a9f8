from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, running, why_not
from tests.helpers import colour_shards, tiny_arch


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real SLURM. CLIPQ_TEST_SLURM=1 says that there has to be one: then it is an error if it cannot be started."""
    if reason := why_not():
        assert os.environ.get("CLIPQ_TEST_SLURM") != "1", reason
        pytest.skip(reason)
    world = tmp_path_factory.mktemp("cluster")
    colour_shards(world / "data", [40, 31, 57])
    tiny_arch(world)
    with running(tmp_path_factory.mktemp("slurm"), world) as running_cluster:
        yield running_cluster
