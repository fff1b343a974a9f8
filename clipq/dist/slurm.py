"""What SLURM tells a process that srun started, in the words of torchrun. Without torch: commands call it first."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK, WORLD_SIZE and what else torchrun sets, where srun has started this process beside others.

    Read from the *step*: a batch script has the variables of its job too, SLURM_PROCID among them, and a command that
    is called there without srun is alone. What is set already stays, so that srun may start torchrun.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "RANK" in environment or "WORLD_SIZE" in environment:
        return
    job, step, node = (int(environment[f"SLURM_{name}"]) for name in ("JOB_ID", "STEP_ID", "NODEID"))
    of_torchrun = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
    }
    environment.update(of_torchrun)
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # Jobs that share a node need ports of their own; from 32768 on, the kernel gives them away.
    environment.setdefault("MASTER_PORT", str(10000 + (job + 101 * step) % 20000))


def requeue() -> bool:
    """Lets the job of this process begin again, when it has ended. False where that is not possible."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    try:
        return subprocess.run(["scontrol", "requeue", job], timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def first_host(hosts: str) -> str:
    """The first of "node[03-05,09],other": node03. `scontrol show hostnames` knows too, but is not in containers."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def tasks_of_nodes(counts: str) -> list[int]:
    """ "8(x3),2" is [8, 8, 8, 2]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
