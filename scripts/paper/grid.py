"""Grids of training runs: several at a time, or in jobs of their own; stopped and gone on with at any moment.

A finished run leaves a record, `records/<arm>-s<seed>.json`, which has all that figures are made of: what is to be
taken along to another machine is that folder. A run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clipq.config.hydra import composed, register, to_job
from clipq.config.schema import TrainJob
from clipq.dist.stop import UNFINISHED
from clipq.log.folder import flatten_yaml
from clipq.report.runs import RunError
from paper.power import Power
from paper.record import last_step, summary

DIVERGED = 1
MISTAKE = 2
"""What `clipq-train` exits with where its settings are wrong."""
ENDED = (UNFINISHED, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a run that was asked to end; it goes on from its checkpoint, if it has one."""
PRCTL, PR_SET_PDEATHSIG = getattr(ctypes.CDLL(None), "prctl", None), 1  # Linux's; looked up before a fork
ELSEWHERE = (
    *("name", "runs", "log", "checkpoint", "resume", "device", "parallel", "dry_run", "gpus"),
    *("data.workers", "data.prefetch", "data.cache", "data.cache_gb"),
    *("eval.workers", "eval.batch_size", "eval.examples"),
)
"""Settings that may differ between a record and what is asked for: they decide where and how a run runs."""


@dataclass(frozen=True)
class Grid:
    """Runs that belong together."""

    experiment: str
    """`configs/experiment/paper/<experiment>.yaml`."""
    arms: Mapping[str, Mapping[str, Sequence[str]]]
    """Scale -> name of an arm -> its overrides."""
    seeds: Mapping[str, int]
    """Scale -> runs of each arm."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """Scale -> option of the group `scale`, where that has another name."""


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    arm: str
    seed: int
    name: str
    """Of its run folder and its record."""
    overrides: tuple[str, ...]


@dataclass
class Options:
    """How a grid is run."""

    scale: str = "small"
    seeds: int | None = None
    """Runs of each arm, in place of the grid's own number."""
    jobs: int = 1
    """Runs at a time on this machine."""
    minutes: float | None = None
    """Stop after so many; the same command goes on. Not with a launcher, whose jobs have time limits of their own."""
    launcher: str | None = None
    """Hydra's launcher, as submitit_slurm: each run is a job of its own."""
    runs: Path = Path("runs/reproduce")
    run: Path | None = None
    """A trained run, for a figure that takes one of any kind."""
    overrides: tuple[str, ...] = ()
    """For `clipq-train`, of every run."""
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = float("inf") if self.minutes is None else time.monotonic() + 60 * self.minutes


class GridError(RuntimeError):
    """A run has failed, or its record is of other settings."""


class UnfinishedError(RuntimeError):
    """Time was up before all runs had finished."""


def jobs_of(grid: Grid, options: Options) -> list[Job]:
    """Every run of a grid: all arms with the first seed, then with the next.

    Raises:
        GridError: an override is of what tells the runs apart.
    """
    seeds = options.seeds or grid.seeds[options.scale]
    common = (f"experiment=paper/{grid.experiment}", f"scale={grid.scales.get(options.scale, options.scale)}")
    arms = grid.arms[options.scale]
    own = {o.partition("=")[0] for overrides in arms.values() for o in overrides} | {"seed", "name", "experiment"}
    for override in options.overrides:
        if (key := override.partition("=")[0]) in own:
            raise GridError(f"{override}: the runs of this figure differ in {key}: leave it out")
    return [
        Job(arm, seed, f"{_slug(arm)}-s{seed}", (*common, *options.overrides, *overrides, f"seed={seed}"))
        for seed in range(seeds)
        for arm, overrides in arms.items()
    ]


def folder_of(grid: Grid, options: Options) -> Path:
    return options.runs / options.scale / grid.experiment


def run_grid(grid: Grid, options: Options) -> dict[str, list[dict[str, Any]]]:
    """Runs what has no record yet.

    Returns:
        For each arm the records of its runs, in the order of seeds.

    Raises:
        GridError: runs have failed (the others were finished first), a record is damaged or of other settings, or
            another process is at these runs.
        UnfinishedError: time was up.
        ConfigError: the settings are wrong; so do Hydra's and OmegaConf's own errors say.
    """
    folder, jobs = folder_of(grid, options), jobs_of(grid, options)
    records = {job.name: _record(folder, job) for job in jobs}
    left = [job for job in jobs if records[job.name] is None]
    if left:
        check(left[0])  # a mistake is told before anything runs
        print(f"{grid.experiment}: {len(jobs) - len(left)} of {len(jobs)} runs are finished", flush=True)
        (folder / "records").mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            failed = _launch(folder, left, options) if options.launcher else _run(folder, left, options)
        records |= {job.name: _record(folder, job) for job in left}
        if failed:
            raise GridError("\n".join(["these runs have failed:", *failed]))
    missing = sum(record is None for record in records.values())
    if missing:
        raise UnfinishedError(f"{grid.experiment}: {missing} of {len(jobs)} runs are left; the same command goes on")
    found: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        found.setdefault(job.arm, []).append(records[job.name] or {})
    return found


def is_finished(grid: Grid, options: Options) -> bool:
    """Whether there is a record of every run."""
    return all((folder_of(grid, options) / "records" / f"{j.name}.json").exists() for j in jobs_of(grid, options))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time runs a grid."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GridError(
                f"another process is at the runs of {folder}: wait for it, or choose another runs="
            ) from None
        yield


def _run(folder: Path, jobs: list[Job], options: Options) -> list[str]:
    """Several at a time, until all are through or time is up; what has failed."""
    waiting, running, powers, failed, finished, start = list(jobs), {}, {}, [], 0, time.monotonic()
    asked = False
    try:
        while running or (waiting and time.monotonic() < options.deadline):
            while waiting and len(running) < options.jobs and time.monotonic() < options.deadline:
                job = waiting.pop(0)
                process = _start(folder, job, options.jobs)
                running[process] = job
                if options.jobs == 1:
                    powers[process] = Power(folder / job.name / "metrics.jsonl")
            if time.monotonic() > options.deadline and not asked:
                asked = True  # once: asked again, a run ends without saving
                _end(running)
            for power in powers.values():
                power.look()
            for process in [p for p in running if p.poll() is not None]:
                job, power = running.pop(process), powers.pop(process, None)
                problem = _finish(folder, job, process.returncode, watts=power and power.stop())
                failed += [problem] if problem else []
                if process.returncode == MISTAKE:  # the others would make it too
                    waiting.clear()
                finished += (folder / "records" / f"{job.name}.json").exists()
                print(f"{job.name}: {finished} of {len(jobs)}, {(time.monotonic() - start) / 60:.1f} min", flush=True)
            time.sleep(0.1)
    finally:
        if not asked:
            _end(running)
        for process in running:
            process.wait()
        for power in powers.values():
            power.stop()
    return failed


def _start(folder: Path, job: Job, together: int) -> subprocess.Popen[bytes]:
    # torch takes all cores for each process, and `together` of them would spend their time in each other's way
    threads = str(max(1, len(os.sched_getaffinity(0)) // together))
    with (folder / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen(
            command_of(folder, job),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Asks this process to save and end when the one that started it is gone, be it killed."""
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def command_of(folder: Path, job: Job) -> list[str]:
    return [sys.executable, "-m", "clipq.cli.train", *job.overrides, f"runs={folder}", f"name={job.name}"]


def _end(running: Mapping[subprocess.Popen[bytes], Job]) -> None:
    """Asks runs to save and end."""
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)


def _finish(folder: Path, job: Job, code: int, watts: float | None = None) -> str | None:
    """Writes the record of a run that has ended; None, or what went wrong."""
    if code in ENDED:
        return None
    try:
        found = summary(folder / job.name, diverged=code == DIVERGED)
    except RunError:  # no step was made
        found = None
    if found is None or (code and found["diverged"] is None):
        log = folder / f"{job.name}.log"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        return f"  {job.name} (exit code {code}): {''.join(last)} [{log}]"
    content = {"arm": job.arm, "seed": job.seed, "settings": settings_of(job), "watts": watts, **found}
    path = folder / "records" / f"{job.name}.json"
    path.with_suffix(".part").write_text(json.dumps(content) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)
    return None


def _launch(folder: Path, jobs: list[Job], options: Options) -> list[str]:
    """Each arm is a sweep of its seeds, in jobs that Hydra's launcher starts; waits for all. Jobs of a cluster are not
    ended with this process."""
    arms: dict[str, list[Job]] = {}
    for job in jobs:
        arms.setdefault(job.arm, []).append(job)
    running = []
    for own in arms.values():
        seeds = ",".join(str(job.seed) for job in own)
        slug = _slug(own[0].arm)
        command = [sys.executable, "-m", "clipq.cli.train", "--multirun", f"hydra/launcher={options.launcher}"]
        command += [*own[0].overrides[:-1], f"seed={seeds}", f"runs={folder}", f"name={slug}-s${{seed}}"]
        with (folder / f"{slug}.log").open("ab") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    for process in running:
        process.wait()
    problems = []
    for arm, own in arms.items():
        for job in own:  # the sweep has one exit code for all of them
            run, steps = folder / job.name, int(settings_of(job)["steps"])
            code = 0 if last_step(run) == steps else DIVERGED
            if problem := _finish(folder, job, code):
                problems.append(f"{problem.partition(' [')[0]} [{folder / f'{_slug(arm)}.log'}]")
    return problems


def settings_of(job: Job) -> dict[str, Any]:
    """What a run's command composes to, without the settings that say only where and how it runs, and with the same
    name for every folder of data."""
    config = _composed(job)
    for part in (config.data, config.eval):
        part.root = "ROOT"
    flat = flatten_yaml(OmegaConf.to_yaml(config, resolve=True))
    return {k: v for k, v in flat.items() if not any(k == part or k.startswith(f"{part}.") for part in ELSEWHERE)}


def check(job: Job) -> None:
    """Raises ConfigError where clipq-train would refuse a run's settings."""
    to_job(_composed(job), TrainJob)


def _composed(job: Job) -> DictConfig:
    register({"clipq.synthetic": lambda: "SYNTHETIC"})
    return composed("train", [*(o for o in job.overrides if not o.startswith("hydra")), f"name={job.name}"])


def _record(folder: Path, job: Job) -> dict[str, Any] | None:
    path = folder / "records" / f"{job.name}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        old = found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise GridError(
            f"{path} is no record ({type(error).__name__}): remove it, and the run is made again"
        ) from error
    wanted = settings_of(job)
    keys = [k for k in sorted({*old, *wanted}) if old.get(k) != wanted.get(k)]
    differing = [f"{k}: {old.get(k)} -> {wanted.get(k)}" for k in keys]
    if differing:
        raise GridError(f"{path} is of other settings: {'; '.join(differing)}. Remove it, or choose another runs=")
    return found


def _slug(name: str) -> str:
    """A name for files: letters, digits and `_`."""
    kept = "".join(c.lower() if c.isascii() and c.isalnum() else " " for c in name.replace("β", "beta"))
    return "_".join(kept.split())
