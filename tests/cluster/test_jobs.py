"""The scripts of slurm/ on a real SLURM: jobs train, are asked to end in each way that there is, and go on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.cluster import Cluster
from tests.cluster.runs import STEPS, Held, checkpoints, settings
from tests.helpers import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """The folder of a run that is left alone."""
    job = cluster.submit("train.sbatch", *settings(cluster.world, "whole"))
    assert cluster.wait(job, "COMPLETED")["ExitCode"] == "0:0"
    return cluster.world / "runs" / "whole"


def same_run(ours: Path, theirs: Path) -> None:
    rows = [[(r["step"], r["samples"], r["loss"], r["grad_norm"]) for r in read_metrics(f)] for f in (ours, theirs)]
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == list(range(1, STEPS + 1))
    one, two = (load_file(f / f"checkpoints/step_{STEPS:08}/model.safetensors") for f in (ours, theirs))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_trains_on_two_nodes(cluster: Cluster, whole: Path) -> None:
    """Rank 0 on the first node, and a log for each node beside that of the job."""
    assert {log.name for log in (whole / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    assert checkpoints(whole) == [f"step_{STEPS:08}"]
    (job,) = {path.name.split("_")[1] for path in cluster.world.glob("clipq_*_node0.log")}
    first, second = (cluster.world / f"clipq_{job}_node{n}.log" for n in (0, 1))
    assert "finished: runs/whole" in first.read_text()
    assert "finished" not in second.read_text()


def test_asked_by_scancel(cluster: Cluster, whole: Path) -> None:
    """A signal to the script alone, which passes it on. The job saves, queues itself again, and goes on."""
    job = cluster.submit("train.sbatch", *settings(cluster.world, "asked"))
    held = Held(cluster, job, "asked")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    held.go_on(signal.SIGUSR1)
    shown = cluster.wait(job, "COMPLETED")
    assert (shown["ExitCode"], shown["Restarts"]) == ("0:0", "1")
    assert f"asked to end: job {job} queues itself again" in cluster.log(job)
    assert cluster.log(job).count("SIGUSR1: the run ended after step") == 1
    assert len(checkpoints(held.folder)) == 2
    same_run(held.folder, whole)


def test_the_time_is_up(cluster: Cluster, whole: Path) -> None:
    """One job has its script told, as B: says, the other its ranks, as the scripts say; that one is of an array."""
    (cluster.world / "grid.txt").write_text("# two runs\n\nname=other steps=1\nname=second 'optim.lr=1e-3'\n")
    own = settings(cluster.world, "first")
    to_script, to_ranks = ("--signal=B:USR1@100",), ("--array=2", "--signal=USR1@100")
    jobs = {
        "first": cluster.submit("train.sbatch", *own, options=to_script),
        "second": cluster.submit("sweep.sbatch", "grid.txt", *own, options=to_ranks),
    }
    held = {name: Held(cluster, job, name) for name, job in jobs.items()}
    for job in jobs.values():
        cluster.shorten(job)
    for run in held.values():
        run.go_on(signal.SIGUSR1)
    for name, job in jobs.items():
        shown = cluster.wait(job, "COMPLETED")
        assert (shown["ExitCode"], shown["Restarts"]) == ("0:0", "1")
        assert cluster.log(job).count("SIGUSR1: the run ended after step") == 1
        same_run(held[name].folder, whole)


def test_cancelled_and_preempted(cluster: Cluster, whole: Path) -> None:
    """A job that SLURM queues again saves first. One that is cancelled saves, and does not come back."""
    cancelled = cluster.submit("train.sbatch", *settings(cluster.world, "cancelled"))
    preempted = cluster.submit("train.sbatch", *settings(cluster.world, "preempted"))
    held = [Held(cluster, cancelled, "cancelled"), Held(cluster, preempted, "preempted")]
    cluster.call("scancel", cancelled)
    cluster.call("scontrol", "requeue", preempted)
    for run in held:
        run.go_on(signal.SIGTERM)
    shown = cluster.wait(preempted, "COMPLETED")
    assert (shown["ExitCode"], shown["Restarts"]) == ("0:0", "1")
    same_run(held[1].folder, whole)
    assert cluster.show(cancelled)["JobState"] == "CANCELLED"
    assert cluster.show(cancelled)["Restarts"] == "0"
    (saved,) = checkpoints(held[0].folder)
    assert "step_00000007" <= saved < f"step_{STEPS:08}"


def test_failures_are_told(cluster: Cluster) -> None:
    """In the log of the job, although they happened on its nodes; and SLURM has the exit code."""
    own = settings(cluster.world, "failing")
    failures = {
        "optim.lrr=1": ("2:0", "optim.lrr: no such setting"),
        "data.shards=no/*.tar": ("2:0", "no shard matches 'no/*.tar'"),
    }
    jobs = {override: cluster.submit("train.sbatch", *own, override) for override in failures}
    for override, (code, said) in failures.items():
        shown = cluster.wait(jobs[override], "FAILED")
        assert shown["ExitCode"] == code
        log = (cluster.world / f"clipq_{jobs[override]}.log").read_text()
        assert said in log
        assert f"clipq-train has failed with code {code[0]} on 127.0.0.[1-2]" in log


def test_evaluates_on_two_nodes(cluster: Cluster, whole: Path) -> None:
    """Each image once, and the result and its page beside the checkpoint."""
    data, task = cluster.world / "data", "eval.tasks.zero_shot"
    files = {"shards": "*.tar", "classnames": "classnames.txt", "templates": "templates.txt"}
    job = cluster.submit(
        "eval.sbatch", f"checkpoint={whole}", "eval=zero_shot", *(f"{task}.{k}={data}/{v}" for k, v in files.items())
    )
    cluster.wait(job, "COMPLETED")
    (written,) = (whole / "eval").glob("*.json")
    assert written.with_suffix(".html").exists()
    assert json.loads(written.read_text())["results"][0]["metrics"]["images"] == 128
