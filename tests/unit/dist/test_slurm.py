from __future__ import annotations

import pytest

from clipq.dist.slurm import adopt, first_host, requeue, tasks_of_nodes

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "99",  # of the job
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}
RANK = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "10", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}


def test_a_task_of_srun() -> None:
    environment = dict(STEP)
    adopt(environment)
    assert environment == STEP | RANK | {"MASTER_PORT": str(10000 + (123456 + 202) % 20000)}


def test_what_is_set_stays() -> None:
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")
    torchrun = STEP | {"RANK": "0", "WORLD_SIZE": "4"}
    environment = dict(torchrun)
    adopt(environment)
    assert environment == torchrun


@pytest.mark.parametrize("tasks", [{}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["batch script", "one task"])
def test_alone(tasks: dict[str, str]) -> None:
    """A batch script has the variables of its job, and would wait for ranks that nobody starts."""
    job = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", **tasks}
    environment = dict(job)
    adopt(environment)
    assert environment == job


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("gpu[003-010,015],big1", "gpu003"),
        ("r1-n[7,9]-ib", "r1-n7-ib"),
        ("rack[2-3]node[01-04]", "rack2node01"),
        ("10.0.0.[4-5]", "10.0.0.4"),
    ],
)
def test_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_tasks_of_nodes() -> None:
    assert tasks_of_nodes("8") == [8]
    assert tasks_of_nodes("8(x3),2") == [8, 8, 8, 2]


def test_requeue_says_where_there_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", "/nowhere")
    assert not requeue()
