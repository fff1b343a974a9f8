"""clipq-eval follow=true: evaluates the checkpoints of a run as they come."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clipq.cli.checkpoints import Chosen, resolve_checkpoint
from clipq.config.checks import ConfigError

if TYPE_CHECKING:
    from clipq.cli.eval import Evaluation

log = logging.getLogger("clipq.cli.eval")

POLL = 10.0
"""Seconds between two looks."""


def followed(checkpoint: str) -> Path:
    """The run folder that is followed.

    Raises:
        ConfigError: it is none.
    """
    run = Path(checkpoint)
    steps_of(run)
    return run


def steps_of(run: Path) -> int:
    """Steps that a run is to make.

    Raises:
        ConfigError: it is no run.
    """
    try:
        return int(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        what = "expected the folder of a run, with its config.yaml"
        raise ConfigError(f"follow=true checkpoint={run}: {what} ({type(error).__name__}: {error})") from error


def follow(evaluation: Evaluation, run: Path) -> None:
    """Evaluates the checkpoints of a run, each once, until that of its last step. Collective.

    A checkpoint is done where `eval/metrics.jsonl` of the run has all tasks of this job for it, as it is now. Reports
    read that file too.

    Raises:
        ConfigError: the run is gone.
    """
    from clipq.build import reported_as_config_error
    from clipq.dist.gather import gather_objects

    env, job = evaluation.env, evaluation.job
    given_up: set[tuple[Path, float]] = set()
    shown = None
    while True:
        with reported_as_config_error():
            looked = gather_objects(_next(run, evaluation.tasks, given_up) if env.is_main else None)[0]
        path, written, newest, steps = looked
        if path is None:
            if newest >= steps:
                log.info("%s has come to its last step, and the checkpoints that it has are evaluated", run)
                return
            if newest != shown:
                log.info("waiting for a checkpoint of %s after step %d of %d", run, newest, steps)
                shown = newest
            time.sleep(POLL)
            continue
        given_up.add((path, written))  # or it would be tried again and again where it cannot be evaluated
        try:
            with reported_as_config_error():
                model, output = resolve_checkpoint(job, str(path))
            output = output if job.output is None else Path(job.output) / output.name
            record = evaluation.of(Chosen(str(path), model, output))
        except ConfigError as error:
            gone = gather_objects(not path.exists())[0]
            why = "was removed before it was evaluated: raise checkpoint.keep_last of the run" if gone else error
            log.warning("%s: %s", path, why)
            continue
        if env.is_main:
            _note(run, path, written, record)


def _next(run: Path, tasks: set[str], given_up: set[tuple[Path, float]]) -> tuple[Path | None, float, int, int]:
    """The first checkpoint that is not done, and when it was written; step of the newest, and steps of the run."""
    from clipq.train.kept import found

    steps, done = steps_of(run), _done(run)
    paths = found(run / "checkpoints")
    newest = _step(paths[-1]) if paths else 0
    for path in paths:
        try:
            written = path.stat().st_mtime
        except FileNotFoundError:  # the run keeps its newest ones
            continue
        if (path, written) not in given_up and not tasks <= done.get((_step(path), written), set()):
            return path, written, newest, steps
    return None, 0.0, newest, steps


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _done(run: Path) -> dict[tuple[int, float], set[str]]:
    """Tasks by (step, when its checkpoint was written)."""
    found: dict[tuple[int, float], set[str]] = {}
    path = run / "eval" / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            found.setdefault((row["step"], row["written"]), set()).add(row["task"])
        except (ValueError, KeyError, TypeError):  # a kill leaves half a line
            continue
    return found


def _note(run: Path, path: Path, written: float, record: dict[str, Any]) -> None:
    folder = run / "eval"
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for r in record["results"]:
            row = {"kind": "eval", "step": _step(path), "task": r["task"], "metrics": r["metrics"], "written": written}
            file.write(json.dumps(row) + "\n")
