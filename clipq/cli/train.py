"""clipq-train: trains a CLIP model as configured; the same command again resumes the run."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clipq.config.checks import ConfigError
from clipq.config.choices import Resume, Wandb
from clipq.config.hydra import run
from clipq.config.schema import TrainJob, check
from clipq.dist.slurm import adopt, requeue
from clipq.dist.stop import Stop, Stopped, caught

if TYPE_CHECKING:
    from clipq.dist.env import DistEnv
    from clipq.train.run import Run
    from clipq.train.upload import RemoteRun

# torch and OpenCLIP take seconds to import, so the functions here import what they need: a mistake in the
# configuration is told at once.

log = logging.getLogger("clipq.cli.train")  # __name__ is __main__ under `python -m`


def main() -> None:
    adopt()
    # What submitit asks a job with, if a launcher uses it. Its own choice, USR2, would end a run with nothing saved.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    with caught() as stop:
        run(TrainJob, "train", functools.partial(train_job, stop=stop), train_launched, synthetic=synthetic)


def synthetic() -> str:
    """`${clipq.synthetic:}` in YAML: the folder of the built-in data set, which `render_synthetic` fills."""
    from clipq.data.synthetic import folder_of

    return str(folder_of())


def render_synthetic(yaml: str) -> None:
    """Renders the built-in data set on first use by a configuration. Twenty seconds: called after all quick checks."""
    from clipq.data.synthetic import CacheError, ensure
    from clipq.log.folder import flatten_yaml

    if any(synthetic() in str(value) for value in flatten_yaml(yaml).values()):
        try:
            ensure()
        except CacheError as error:
            raise ConfigError(str(error)) from error


def train_job(job: TrainJob, yaml: str, *, stop: Stop) -> None:
    """Runs a job on this process and those that torchrun started beside it."""
    if job.dry_run:
        from clipq.cli.dry_run import dry_run

        dry_run(job, yaml)
        return
    from clipq.dist.env import (
        cuda_capability,
        distributed,
        local_world_size_from_environment,
        world_size_from_environment,
    )
    from clipq.train.lock import locked

    check(
        job,
        world_size=world_size_from_environment(),
        local_world_size=local_world_size_from_environment(),
        capability=cuda_capability(),
    )
    render_synthetic(yaml)
    folder = Path(job.runs) / job.name
    # NCCL's record of the last collectives; read as ranks find each other, written where one of them takes too long
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.absolute() / "logs" / "nccl_trace_rank_"))
    with distributed(job.device.value, timeout_minutes=job.parallel.timeout_minutes) as env:
        stop.at_once = not env.is_distributed  # from here on ranks wait for each other
        _check_wandb(job, env)
        with locked(folder, env):
            _train(job, folder, yaml, env, stop)


def train_launched(job: TrainJob, yaml: str) -> None:
    """Runs a job of a grid, in a job of SLURM that a launcher of Hydra started; asked to end, that is queued again."""
    adopt()
    try:
        with caught() as stop:
            train_job(job, yaml, stop=stop)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0" and not requeue():
            raise RuntimeError(f"{stopped}, but this is no job that can be queued again") from stopped
        raise


def _check_wandb(job: TrainJob, env: DistEnv) -> None:
    from clipq.dist.gather import raised_on_every_rank
    from clipq.log.writers import check_wandb_login

    with raised_on_every_rank(ConfigError):
        if env.is_main and job.log.wandb is Wandb.online:
            check_wandb_login()


def _train(job: TrainJob, folder: Path, yaml: str, env: DistEnv, stop: Stop) -> None:
    from clipq.build import build_run, build_writers, reported_as_config_error
    from clipq.data.shards import DataError
    from clipq.dist.watchdog import watched
    from clipq.eval.common import EvalError
    from clipq.log.console import Console, setup_logging
    from clipq.log.folder import environment, flatten_yaml, write_folder
    from clipq.train.checkpoint import CheckpointError, disk_is_full
    from clipq.train.loop import owed, train
    from clipq.train.run import DivergedError, close, write

    lines = _look_at_folder(job, folder, yaml, env)
    console = Console(enabled=env.is_main)
    setup_logging(console, file=folder / "logs" / f"rank_{env.rank}.log", rank=env.rank)
    for line in lines:
        log.warning("%s", line)
    try:
        training = build_run(job, env, folder, yaml, console, stop)
        if training.state.step >= job.steps and not owed(training):
            log.info("%s has done its %d steps: raise steps, or choose another name=", folder, training.state.step)
            _finish_uploads(job, training)
            return
        if env.is_main:
            facts = environment(env.device, env.world_size) | training.facts()
            write_folder(folder, yaml, facts)
            log.info("%s", " | ".join(f"{k} {v}" for k, v in facts.items() if k in SHOWN))
        training.writers = build_writers(job, folder, env, step=training.state.step, config=flatten_yaml(yaml))
        with reported_as_config_error():
            if job.checkpoint.upload and env.is_main:
                with _copy_of(job) as copy:  # what cannot be written there is told before it is trained
                    copy.put_files(folder)
        if training.state.step:
            write(training, [{"kind": "resume", "step": training.state.step, "seconds": training.state.seconds}])
        limit = 60 * job.parallel.step_timeout_minutes
        try:
            with watched(env, training.progress, limit=limit, folder=folder / "logs"):
                train(training)
        except Stopped:
            close(training)
            env.barrier()  # a launcher that sees one rank end ends the others
            if training.checkpoints.uploads is not None:
                training.checkpoints.uploads.leave()
            raise
        _finish_uploads(job, training)
        close(training)
        env.barrier()  # for as long as rank 0's writers take, as above
        log.info("finished: %s", folder)
    except ConfigError:
        raise
    except (DivergedError, EvalError, CheckpointError) as error:  # on every rank at once: rank 0 speaks for all
        log.log(logging.ERROR if env.is_main else logging.WARNING, "%s", error)
        raise SystemExit(1) from error
    except DataError as error:  # of one rank
        log.error("%s", error)
        env.tell_why(str(error))
        raise SystemExit(1) from error
    except Exception as error:
        if (why := env.why()) is not None:
            log.warning("this rank ends since another did: %s", why)
            raise SystemExit(1) from error
        env.tell_why(f"{type(error).__name__}: {error}")
        if disk_is_full(error):
            log.error("%s: the disk is full: make room, and the same command goes on from the last checkpoint", folder)
            raise SystemExit(1) from error
        # into the log file of this rank too; the interpreter prints it
        log.exception("the run ended with an error")
        raise
    finally:
        console.close()


def _look_at_folder(job: TrainJob, folder: Path, yaml: str, env: DistEnv) -> list[str]:
    """Fetches and checks what the run is to go on from; what there is to tell of it. Collective."""
    from clipq.build import reported_as_config_error
    from clipq.dist.gather import gather_objects
    from clipq.log.folder import changes
    from clipq.train.checkpoint import set_aside_damaged
    from clipq.train.kept import newest
    from clipq.train.upload import fetch

    checkpoints, lines = folder / "checkpoints", []
    with reported_as_config_error():  # which waits: every rank has read the folder before one of them changes it
        if job.resume is Resume.never and (old := newest(checkpoints)):
            raise ConfigError(f"resume=never, but {folder} holds {old.name}: choose another name=, or remove it")
    with reported_as_config_error():
        if env.is_main and job.checkpoint.upload:
            with _copy_of(job) as copy:
                if job.resume is Resume.never and (there := copy.checkpoints()):
                    raise ConfigError(
                        f"resume=never, but {copy.address} holds {there[-1]}: choose another name=, or remove it"
                    )
                lines += fetch(copy, folder)
        if env.is_main:
            lines += set_aside_damaged(checkpoints)
    found = gather_objects(newest(checkpoints))[0]  # as rank 0 sees it: other machines may see the folder as it was
    with reported_as_config_error():
        differing = [] if found is None else changes((found / "config.yaml").read_text(encoding="utf-8"), yaml)
    return lines + [f"changed since the checkpoint: {line}" for line in differing]


@contextmanager
def _copy_of(job: TrainJob) -> Iterator[RemoteRun]:
    """The copy of the run at `checkpoint.upload`; what fails with it is a mistake in that."""
    from clipq.train.upload import RemoteRun

    try:
        yield RemoteRun(f"{job.checkpoint.upload}/{job.name}")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        what = str(error) or type(error).__name__
        raise ConfigError(f"checkpoint.upload={job.checkpoint.upload}: {what}") from error


def _finish_uploads(job: TrainJob, training: Run) -> None:
    """Waits for the copy of the last checkpoint, in short collectives: the limit of one does not hold for it.

    Raises:
        CheckpointError: on every rank, if it could not be copied.
        ConfigError: the metrics of the evaluations that came after it could not.
    """
    from clipq.dist.gather import raised_on_every_rank
    from clipq.train.checkpoint import CheckpointError
    from clipq.train.events import tell_failed_saves

    uploads = training.checkpoints.uploads
    while training.env.broadcast_flag(uploads is not None and uploads.busy(seconds=5)):
        tell_failed_saves(training)
    with raised_on_every_rank(CheckpointError):
        if uploads is not None and uploads.failed is not None:
            raise CheckpointError(
                f"{uploads.failed}; the run is whole in {training.folder}, and the same command tries again"
            )
    with raised_on_every_rank(ConfigError):
        if uploads is not None:
            with _copy_of(job) as copy:
                copy.put_files(training.folder)


SHOWN = ("device", "world_size", "torch", "parameters", "gflops_per_image")


if __name__ == "__main__":
    main()
