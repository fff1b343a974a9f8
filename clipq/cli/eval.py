"""clipq-eval: evaluates checkpoints zero-shot, by retrieval and by linear probes; tables, JSON and a page for each."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from clipq.cli.checkpoints import Chosen, as_stored, choose, with_tasks
from clipq.cli.follow import follow, followed
from clipq.cli.train import render_synthetic, synthetic
from clipq.config.checks import ConfigError
from clipq.config.choices import MissingData, Switch
from clipq.config.evaluation import TaskConfig
from clipq.config.hydra import run
from clipq.config.schema import EvalJob, check_backend
from clipq.dist.slurm import adopt

if TYPE_CHECKING:
    from clipq.dist.env import DistEnv
    from clipq.eval.common import EvalResult, Evaluator
    from clipq.log.console import Console

log = logging.getLogger("clipq.cli.eval")


def main() -> None:
    adopt()
    run(EvalJob, "eval", eval_job, eval_launched, synthetic=synthetic)


def eval_launched(job: EvalJob, resolved: str) -> None:
    """Runs an evaluation of a grid, in a job of SLURM that a launcher of Hydra started."""
    adopt()
    eval_job(job, resolved)


def eval_job(job: EvalJob, resolved: str) -> None:
    """Runs an evaluation on this process and those that torchrun started beside it."""
    from clipq.dist.env import cuda_capability, distributed

    check_backend(job.backend, device=job.device, capability=cuda_capability())
    job.eval = with_tasks(job.eval, job.checkpoint)
    render_synthetic(resolved)
    with distributed(job.device.value, timeout_minutes=job.parallel.timeout_minutes) as env:
        _evaluate(job, env)


def _evaluate(job: EvalJob, env: DistEnv) -> None:
    from clipq.build import reported_as_config_error
    from clipq.build_backend import warn_of_slow_bf16
    from clipq.build_eval import build_evaluators
    from clipq.eval.results import table
    from clipq.log.console import Console, setup_logging

    console = Console(enabled=env.is_main)
    setup_logging(console, file=None, rank=env.rank)
    warn_of_slow_bf16(job.backend, env.device)
    with reported_as_config_error():
        chosen = [] if job.follow else choose(job)  # all are looked at before the first is evaluated
        run = followed(job.checkpoint) if job.follow else None
        evaluators, missing = build_evaluators(job.eval)
    evaluation = Evaluation(job, env, console, evaluators, missing)
    if run is not None:
        try:
            follow(evaluation, run)
        except KeyboardInterrupt:  # how the waiting is ended; what was found is written
            raise SystemExit(130) from None
        return
    records, failures = {}, []
    for one in chosen:
        try:
            records[one.name] = evaluation.of(one)
        except ConfigError as error:
            if len(chosen) == 1:
                raise
            log.error("%s: %s", one.name, error)
            failures.append(one.name)
    if len(chosen) > 1:
        console.message(table(records))
    if failures:
        raise ConfigError(f"{len(failures)} of {len(chosen)} checkpoints could not be evaluated: {', '.join(failures)}")


class Evaluation:
    """What is done with each checkpoint."""

    def __init__(
        self, job: EvalJob, env: DistEnv, console: Console, evaluators: list[Evaluator], missing: dict[str, str]
    ) -> None:
        self.job, self.env, self.console = job, env, console
        self._evaluators, self._missing = evaluators, missing
        self.tasks = {evaluator.task for evaluator in evaluators}

    def of(self, one: Chosen) -> dict[str, Any]:
        """Evaluates a checkpoint, and writes and shows what was found. Collective.

        Raises:
            ConfigError: its weights do not load, or an evaluator cannot use its data.
        """
        from clipq.build import build_model, reported_as_config_error
        from clipq.build_backend import compile_blocks, convert
        from clipq.build_eval import build_encoder
        from clipq.eval.common import EvalError
        from clipq.eval.results import record_of, table
        from clipq.log.folder import environment

        job, env = self.job, self.env
        with reported_as_config_error():
            clip = build_model(as_stored(job, one.model))
        clip.model.to(env.device)
        convert(clip, job.backend, pairs=job.eval.batch_size, training=False)
        compiled = job.backend.compile is Switch.on  # a minute, which few data sets are worth
        if compiled:
            compile_blocks(clip.model, job.backend, env)
        log.info("evaluating %s (%s) on %s in %s", one.name, one.model.name, env.device, job.backend.precision.value)
        encoder = build_encoder(clip, job.backend, job.eval, env, self.console)
        encoder = replace(encoder, classifiers={}, compiled=compiled)
        results, failed = [], {}
        for evaluator in self._evaluators:
            try:
                results.append(evaluator.run(encoder))
            except EvalError as error:
                if job.eval.missing is MissingData.error:
                    raise ConfigError(str(error)) from error
                log.error("%s", error)  # of a suite the other sets count all the same
                failed[evaluator.task] = str(error)
        facts = {
            "checkpoint": one.name,
            "weights": str(one.model.pretrained),
            "model": one.model.name,
            "precision": job.backend.precision.value,
            "recipe": job.backend.recipe.value,
            "tasks": {name: given(task) for name, task in job.eval.tasks.items()},
            "environment": environment(env.device, env.world_size),
        }
        record = record_of(facts, results, job.eval.averages, self._missing | failed)
        if env.is_main:
            write_results(one.output, record, results)
            self.console.message(table({one.name: record}))
            self.console.message(f"wrote {one.output} and {one.output.with_suffix('.html')}")
        env.barrier()
        return record


def given(task: TaskConfig) -> dict[str, Any]:
    """The settings of a task that are not the defaults."""
    settings, defaults = (
        OmegaConf.to_container(OmegaConf.structured(of), enum_to_str=True) for of in (task, TaskConfig)
    )
    assert isinstance(settings, dict)
    assert isinstance(defaults, dict)
    return {str(key): value for key, value in settings.items() if value != defaults[key]}


def write_results(output: Path, record: dict[str, Any], results: list[EvalResult]) -> None:
    """Writes a record as JSON, and the page about it beside."""
    from clipq.report.evaluation import evaluation_page

    pictures = {r.task: {"Taken for something else": r.mistakes, "Chosen at random": r.examples} for r in results}
    output.parent.mkdir(parents=True, exist_ok=True)  # of a run that is followed it may be new
    output.with_suffix(".html").write_text(evaluation_page(record, pictures), encoding="utf-8")
    part = output.with_name(f".{output.name}.part")  # a JSON that is there is whole
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(output)


if __name__ == "__main__":
    main()
