"""clipq-eval: evaluates checkpoints zero-shot, by retrieval and by linear probes; tables, JSON and a page for each."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clipq.cli.checkpoints import Chosen, as_stored, choose, resolve_checkpoint
from clipq.cli.train import render_synthetic, synthetic
from clipq.config.checks import ConfigError
from clipq.config.choices import Switch
from clipq.config.hydra import run
from clipq.config.schema import EvalJob, check_backend
from clipq.dist.slurm import adopt

if TYPE_CHECKING:
    from clipq.dist.env import DistEnv
    from clipq.eval.common import EvalResult, Evaluator
    from clipq.log.console import Console

log = logging.getLogger("clipq.cli.eval")

POLL = 10.0
"""Seconds between two looks at a run that is followed."""


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
        follow(evaluation, run)
        return
    records = {one.name: evaluation.of(one) for one in chosen}
    if len(records) > 1:
        console.message(table(records))


class Evaluation:
    """What is done with each checkpoint."""

    def __init__(
        self, job: EvalJob, env: DistEnv, console: Console, evaluators: list[Evaluator], missing: dict[str, str]
    ) -> None:
        self.job, self.env, self.console = job, env, console
        self._evaluators, self._missing = evaluators, missing

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
        try:
            results = [evaluator.run(encoder) for evaluator in self._evaluators]
        except EvalError as error:
            raise ConfigError(str(error)) from error
        facts = {
            "checkpoint": one.name,
            "model": one.model.name,
            "precision": job.backend.precision.value,
            "recipe": job.backend.recipe.value,
            "environment": environment(env.device, env.world_size),
        }
        record = record_of(facts, results, job.eval.averages, self._missing)
        if env.is_main:
            write_results(one.output, record, results)
            self.console.message(table({one.name: record}))
            self.console.message(f"wrote {one.output} and {one.output.with_suffix('.html')}")
        env.barrier()
        return record


def followed(checkpoint: str) -> Path:
    """The run folder that is followed.

    Raises:
        ConfigError: it is none.
    """
    run = Path(checkpoint)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"follow=true checkpoint={checkpoint}: expected the folder of a run, with its config.yaml")
    return run


def follow(evaluation: Evaluation, run: Path) -> None:
    """Evaluates the checkpoints of a run as they come, each once, until its last step. Collective.

    What was found goes into `eval/metrics.jsonl` of the run too, which reports read.
    """
    from clipq.build import reported_as_config_error
    from clipq.dist.gather import gather_objects

    env = evaluation.env
    while True:
        new, ended = gather_objects(_new(run) if env.is_main else None)[0]
        for path in new:
            try:
                with reported_as_config_error():
                    model, output = resolve_checkpoint(evaluation.job, str(path))
                record = evaluation.of(Chosen(str(path), model, output))
            except ConfigError:
                if gather_objects(path.exists())[0]:
                    raise
                log.warning("%s was removed before it was evaluated: raise checkpoint.keep_last of the run", path)
                continue
            if env.is_main:
                _note(run, path, record)
        if ended and not new:
            log.info("%s has come to its last step, and all of its checkpoints are evaluated", run)
            return
        if not new:
            time.sleep(POLL)


def _new(run: Path) -> tuple[list[Path], bool]:
    """Checkpoints that are not evaluated, or were written again since; whether the last of the run is there."""
    from clipq.train.kept import found

    paths = found(run / "checkpoints")
    steps = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["steps"]
    ended = bool(paths) and int(paths[-1].name.removeprefix("step_")) >= steps
    results = [run / "eval" / f"{path.name}.json" for path in paths]
    return [
        path
        for path, result in zip(paths, results, strict=True)
        if not (result.is_file() and result.stat().st_mtime >= path.stat().st_mtime)
    ], ended


def _note(run: Path, path: Path, record: dict[str, Any]) -> None:
    step = int(path.name.removeprefix("step_"))
    rows = [{"kind": "eval", "step": step, "task": r["task"], "metrics": r["metrics"]} for r in record["results"]]
    with (run / "eval" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_results(output: Path, record: dict[str, Any], results: list[EvalResult]) -> None:
    """Writes a record as JSON, and the page about it beside."""
    from clipq.report.evaluation import evaluation_page

    pictures = {r.task: {"Taken for something else": r.mistakes, "Chosen at random": r.examples} for r in results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".html").write_text(evaluation_page(record, pictures), encoding="utf-8")
    part = output.with_name(f".{output.name}.part")  # a JSON that is there is whole: who follows a run asks for it
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(output)


if __name__ == "__main__":
    main()
