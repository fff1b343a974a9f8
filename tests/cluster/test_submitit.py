"""Hydra's launcher for SLURM: a grid of runs, each a job of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.cluster import SECONDS, Cluster, wait_for
from tests.cluster.runs import checkpoints, settings
from tests.helpers import read_metrics, steps_done

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'clipq[slurm]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 100


@contextmanager
def launched(cluster: Cluster, *arguments: str) -> Iterator[subprocess.Popen]:
    """`clipq-train --multirun`, which waits for its jobs."""
    launcher = ["--multirun", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipq.cli.train", *launcher, *arguments],
        cwd=cluster.world,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_grid_of_four(cluster: Cluster) -> None:
    """One of them is asked to end, with what submitit uses when the time is up: it is queued again, and goes on."""
    runs = cluster.world / "runs"
    own = settings(cluster.world, "grid_${optim.lr}_${seed}", f"steps={STEPS}")
    with launched(cluster, *own, "optim.lr=1e-3,1e-4", "seed=0,1") as process:
        first = runs / "grid_0.001_0"
        wait_for(lambda: steps_done(first) >= 7 or process.poll() is not None, lambda: "it does not begin")
        (folder,) = (runs / ".submitit").glob("*_0")
        cluster.call("scancel", "--signal=USR1", folder.name)
        shown = cluster.wait(folder.name, "COMPLETED")
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert (shown["Restarts"], shown["JobName"]) == ("1", "clipq")
    rates = {path.name: read_metrics(path)[-1] for path in runs.glob("grid_*")}
    assert {name: row["step"] for name, row in rates.items()} == {
        f"grid_{rate}_{seed}": STEPS for rate in ("0.001", "0.0001") for seed in (0, 1)
    }
    assert len({row["loss"] for row in rates.values()}) == 4
    stopped, *_ = checkpoints(first)
    assert "step_00000007" <= stopped < f"step_{STEPS:08}"


def test_a_run_of_a_grid_fails(cluster: Cluster) -> None:
    """The command that waits for it says why, in one line, and so does the log of the job."""
    own = settings(cluster.world, "lost_${seed}", "data.shards=no/*.tar", "runs=lost")
    with launched(cluster, *own, "seed=0,1") as process:
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "train: no shard matches 'no/*.tar'" in said
    assert "Traceback" not in said
    (log, *_) = (cluster.world / "lost" / ".submitit").glob("*/*_log.err")
    assert "no shard matches 'no/*.tar'" in log.read_text()
