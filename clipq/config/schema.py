"""What `clipq-train` and `clipq-eval` run, and the checks that look at several groups of settings at once.

Hydra merges `configs/` and the command line onto the dataclasses here and in `groups.py`. Every message names the
setting, what was expected and how to mend it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from clipq.config.checks import ConfigError, require, strings
from clipq.config.choices import Device, GuardPolicy, Loss, Precision, Recipe, Resume, Strategy, Switch
from clipq.config.data import DataConfig
from clipq.config.evaluation import EvalConfig
from clipq.config.groups import (
    SHARDING,
    BackendConfig,
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
)
from clipq.config.watch import GuardConfig, WatchConfig


@dataclass
class TrainJob:
    """What `clipq-train` runs."""

    model: ModelConfig = MISSING
    """Architecture and initial weights (group `model`)."""
    data: DataConfig = MISSING
    """Training data (group `data`)."""
    backend: BackendConfig = MISSING
    """Arithmetic and compilation (group `backend`)."""
    optim: OptimConfig = MISSING
    """Optimizer (group `optim`)."""
    schedule: ScheduleConfig = MISSING
    """Learning-rate schedule (group `schedule`)."""
    parallel: ParallelConfig = MISSING
    """Work over several processes (group `parallel`)."""
    log: LogConfig = MISSING
    """Console, metrics, trackers, profiler (group `log`)."""
    eval: EvalConfig = MISSING
    """Evaluation during and after training (group `eval`)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and which are kept."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is watched to see instability coming."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens to a step that would spoil the weights."""
    name: str = MISSING
    """Name of the run: its folder is `runs/<name>`. The same name again resumes the run."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 256
    """Pairs in one step over all ranks."""
    accumulation: int = 1
    """Parts of a rank's pairs that go through the model one after another, for memory of one part: the loss contrasts
    all pairs of all ranks as with 1, and gradients are the same, for up to a third more time."""
    seed: int = 0
    """Decides initial weights, order of samples, augmentation and dropout."""
    device: Device = Device.auto
    """auto takes CUDA where there is one."""
    resume: Resume = Resume.auto
    """auto continues the run folder at its newest checkpoint; never refuses a folder that has one."""
    loss: Loss = Loss.softmax
    """softmax is CLIP's contrastive loss. siglip is SigLIP's sigmoid loss; it gives a model without a logit bias one of
    -10, and a logit scale of 10 to start with, as its paper does."""
    max_logit_scale: float = 100.0
    """The logit scale is clamped to at most this after each step."""
    dry_run: bool = False
    """Train nothing and write nothing: print what the command would do, what it would take in memory, time and disk,
    and what is wrong with it. See docs/slurm.md."""
    gpus: int | None = None
    """For dry_run: GPUs that the run is planned for; None for the processes that were started."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps}: expected 1 or more")
        require(self.batch_size >= 2, f"batch_size={self.batch_size}: a contrast needs at least 2 pairs")
        require(self.accumulation >= 1, f"accumulation={self.accumulation}: expected 1 or more")
        require(self.seed >= 0, f"seed={self.seed}: expected 0 or more")
        require(
            self.gpus is None or self.dry_run,
            f"gpus={self.gpus} without dry_run=true: it plans a run; torchrun or SLURM start its processes",
        )
        require(self.gpus is None or self.gpus >= 1, f"gpus={self.gpus}: expected 1 or more, or null")
        require(
            1 <= self.max_logit_scale < math.inf, f"max_logit_scale={self.max_logit_scale}: expected a number from 1 on"
        )
        require(
            self.log.profile is None or self.log.profile[1] <= self.steps,
            f"log.profile={self.log.profile}: the run has steps={self.steps}: profile earlier ones, or raise steps",
        )
        require(
            self.guard.rise is None or self.backend.precision is not Precision.fp16,
            f"guard.rise={self.guard.rise} with backend.precision=fp16, whose loss scaling decides on each update: use "
            "bf16, or guard.rise=null (losses that are not finite are seen with fp16 too)",
        )
        require(
            self.guard.policy is not GuardPolicy.rewind or self.checkpoint.every > 0 or self.checkpoint.minutes > 0,
            "guard.policy=rewind with checkpoint.every=0 and checkpoint.minutes=0 has nothing to go back to: set one",
        )
        s = self.schedule
        require(
            s.warmup + s.cooldown <= self.steps,
            f"schedule.warmup={s.warmup}{f' with schedule.cooldown={s.cooldown}' if s.cooldown else ''} is longer than "
            f"the run, steps={self.steps}: lower it or raise steps",
        )
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"name={self.name!r}: expected a folder name without '/'; runs= sets the folder that it lies in",
        )
        require(
            self.guard.rise is None or self.watch.ignore < self.steps,
            f"guard.rise={self.guard.rise} would never hold: steps={self.steps} are within watch.ignore="
            f"{self.watch.ignore}: lower watch.ignore, or leave guard.rise at null",
        )


@dataclass
class EvalJob:
    """What `clipq-eval` runs."""

    checkpoint: Any = MISSING
    """What to evaluate: a run folder, a checkpoint folder, a weights file, a pattern of these, or an OpenCLIP tag (with
    `model=`); or a list of them."""
    follow: bool = False
    """`checkpoint` is the folder of a run: evaluate each of its checkpoints, and those that come, until the run's last
    step."""
    model: ModelConfig | None = None
    """Architecture of the weights (group `model`); not needed for a clipq run or checkpoint, which carries its own."""
    backend: BackendConfig = MISSING
    """Arithmetic and compilation (group `backend`)."""
    eval: EvalConfig = MISSING
    """What to evaluate on (group `eval`); not needed for a clipq run or checkpoint, which has its own tasks."""
    output: str | None = None
    """JSON file for the results, or a folder (always so for several checkpoints, or with follow); None writes
    `eval/<step or file name>.json` beside each checkpoint. A page of the same name lies beside it."""
    device: Device = Device.auto
    """auto takes CUDA where there is one."""
    parallel: ParallelConfig = MISSING
    """Work over several processes (group `parallel`)."""

    def __post_init__(self) -> None:
        strings("checkpoint", self.checkpoint)
        require(
            not self.follow or isinstance(self.checkpoint, str),
            "follow=true: expected one run folder as checkpoint=",
        )


def check(job: TrainJob, *, world_size: int, local_world_size: int, capability: tuple[int, int] | None) -> None:
    """Checks that look at the processes and the device.

    Args:
        local_world_size: processes on this node.
        capability: compute capability of this process's GPU, None where there is none.

    Raises:
        ConfigError: the job cannot run with `world_size` processes on this device.
    """
    for problem in problems(job, world_size=world_size, local_world_size=local_world_size, capability=capability):
        raise ConfigError(problem)


def problems(
    job: TrainJob, *, world_size: int, local_world_size: int, capability: tuple[int, int] | None
) -> Iterator[str]:
    """All that `check` would refuse, one after another."""
    checks = (
        lambda: _check_batch(job, world_size),
        lambda: _check_parallel(job, world_size, local_world_size),
        lambda: _check_lanes(job, world_size),
        lambda: check_backend(job.backend, device=job.device, capability=capability),
        lambda: _check_cuda_graph(job, capability),
    )
    for one in checks:
        try:
            one()
        except ConfigError as error:
            yield str(error)


def _check_batch(job: TrainJob, world_size: int) -> None:
    require(
        job.batch_size % world_size == 0,
        f"batch_size={job.batch_size} is not divisible by the {world_size} processes: "
        f"the nearest that is: {max(1, round(job.batch_size / world_size)) * world_size}",
    )
    parts = job.accumulation * world_size
    require(
        job.batch_size % parts == 0,
        f"batch_size={job.batch_size} cannot be cut into accumulation={job.accumulation} equal parts"
        f"{f' on each of {world_size} processes' if world_size > 1 else ''}: the nearest that can: "
        f"{max(1, round(job.batch_size / parts)) * parts}",
    )


def _check_parallel(job: TrainJob, world_size: int, local_world_size: int) -> None:
    require(
        job.parallel.strategy is not Strategy.none or world_size == 1,
        f"parallel=none with {world_size} processes: choose parallel=ddp, or start one process",
    )
    if job.parallel.strategy in SHARDING:
        job.parallel.copies(world_size, local_world_size)
        require(
            job.backend.precision is not Precision.fp16 or job.backend.loss_scale is not None,
            f"backend.precision=fp16 with parallel={job.parallel.strategy.value}: torch's dynamic loss scale does not "
            "take shards: set backend.loss_scale=65536, or choose backend=bf16",
        )


def _check_lanes(job: TrainJob, world_size: int) -> None:
    lanes = job.data.lanes
    require(
        lanes is None or lanes % world_size == 0,
        f"data.lanes={lanes} cannot be shared evenly by {world_size} processes: "
        f"the nearest that can: {max(1, round((lanes or 1) / world_size)) * world_size}",
    )


def _check_cuda_graph(job: TrainJob, capability: tuple[int, int] | None) -> None:
    require(
        job.backend.cuda_graph is not Switch.on or (capability is not None and job.device is not Device.cpu),
        "backend.cuda_graph=on needs a CUDA GPU: choose backend.cuda_graph=auto",
    )
    require(
        job.backend.cuda_graph is not Switch.on or not job.model.grad_checkpointing,
        "backend.cuda_graph=on with model.grad_checkpointing=true: recomputation cannot be recorded; choose one",
    )
    require(
        job.backend.cuda_graph is not Switch.on or job.accumulation == 1,
        f"backend.cuda_graph=on with accumulation={job.accumulation}: parts that go through the model again with the "
        "same random numbers cannot be recorded; choose one",
    )


def check_backend(backend: BackendConfig, *, device: Device, capability: tuple[int, int] | None) -> None:
    """Checks what a backend needs of the device.

    Args:
        capability: compute capability of this process's GPU, None where there is none.

    Raises:
        ConfigError: the device lacks it.
    """
    require(
        device is not Device.cuda or capability is not None,
        "device=cuda: no CUDA GPU is visible to torch; use device=cpu, or check the driver and CUDA_VISIBLE_DEVICES",
    )
    on_cuda = capability is not None and device is not Device.cpu
    require(
        backend.precision is not Precision.fp16 or on_cuda,
        "backend.precision=fp16 (backend=fp16) needs a CUDA GPU (loss scaling and fp16 kernels): on a CPU choose "
        "backend.precision=bf16 or fp32",
    )
    if capability is None or not on_cuda:
        return
    needed = (8, 9) if "fp8" in backend.recipe.value else (8, 0)
    simulated = backend.recipe.value.endswith("_sim")
    require(
        backend.recipe is Recipe.bf16 or simulated or capability >= needed,
        f"backend.recipe={backend.recipe.value} needs a GPU of compute capability {needed[0]}.{needed[1]} or newer, "
        f"this one has {capability[0]}.{capability[1]}: choose backend=bf16, or backend=fp8_sim or switchback_fp8_sim",
    )
