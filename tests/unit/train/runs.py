"""A run as the trainer builds it, for tests that look inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipq.build import build_run, build_writers
from clipq.config.hydra import composed, register, to_job
from clipq.config.schema import TrainJob
from clipq.dist.env import DistEnv
from clipq.log.console import Console
from clipq.train.run import Run


def run_of(arch: Path, shards: Sequence[str], *overrides: str, env: DistEnv, folder: Path = Path("run")) -> Run:
    """Six steps of 8 pairs on the CPU, in fp32."""
    register({})
    cfg = composed(
        "train",
        [
            *(f"model.name={arch}", f"data.shards=[{','.join(shards)}]", "name=x", "batch_size=8", "steps=6"),
            *("backend=fp32", "data.workers=0", "device=cpu", "log.every=2", "optim.clip_norm=1.0", *overrides),
        ],
    )
    job = to_job(cfg, TrainJob)
    run = build_run(job, env, folder, "", Console(enabled=False))
    run.writers = build_writers(job, folder, env, step=run.state.step, config={})
    return run
