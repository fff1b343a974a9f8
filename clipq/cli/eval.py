"""clipq-eval: evaluates a checkpoint zero-shot, by retrieval and by a linear probe, prints a table and writes JSON."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from clipq.cli.train import render_synthetic, synthetic
from clipq.config.checks import ConfigError
from clipq.config.groups import ModelConfig
from clipq.config.hydra import run
from clipq.config.schema import EvalJob, check_backend
from clipq.dist.slurm import adopt

if TYPE_CHECKING:
    from clipq.dist.env import DistEnv
    from clipq.eval.common import EvalResult

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
    render_synthetic(resolved)
    with distributed(job.device.value, timeout_minutes=job.parallel.timeout_minutes) as env:
        _evaluate(job, env)


def _evaluate(job: EvalJob, env: DistEnv) -> None:
    from clipq.build import build_model, reported_as_config_error
    from clipq.build_backend import convert, warn_of_slow_bf16
    from clipq.build_eval import build_encoder, build_evaluators
    from clipq.eval.common import EvalError
    from clipq.log.console import Console, setup_logging
    from clipq.log.folder import environment

    console = Console(enabled=env.is_main)
    setup_logging(console, file=None, rank=env.rank)
    warn_of_slow_bf16(job.backend, env.device)
    with reported_as_config_error():
        config, output = resolve_checkpoint(job)
        evaluators = build_evaluators(job.eval)
        clip = build_model(_as_stored(job, config))
    clip.model.to(env.device)
    convert(clip, job.backend, pairs=job.eval.batch_size, training=False)
    log.info("evaluating %s (%s) on %s in %s", job.checkpoint, config.name, env.device, job.backend.precision.value)
    encoder = build_encoder(clip, job.backend, job.eval, env, console)
    try:
        results = [evaluator.run(encoder) for evaluator in evaluators]
    except EvalError as error:
        raise ConfigError(str(error)) from error
    if env.is_main:
        write_results(output, job, config, results, environment(env.device, env.world_size))
        console.message(table(results))
        console.message(f"wrote {output}")
    env.barrier()


def resolve_checkpoint(job: EvalJob) -> tuple[ModelConfig, Path]:
    """The model with its weights, and where the results go.

    Raises:
        ConfigError: neither a run, a checkpoint nor a weights file, or weights without an architecture.
    """
    from clipq.model.weights import CONFIG_FILE, find_weights

    path = Path(job.checkpoint)
    if not path.exists():
        if job.model is None:
            raise ConfigError(
                f"checkpoint={job.checkpoint}: no such file or folder. For an OpenCLIP tag name the model too, as in "
                "model=vit_b_32 checkpoint=laion2b_s34b_b79k"
            )
        output = Path("eval") / f"{job.model.name}-{job.checkpoint}.json"
        return _with_weights(job.model, job.checkpoint), Path(job.output or output)
    weights = find_weights(path)
    beside = weights.parent / "config.yaml"
    if weights.parent.parent.name == "checkpoints":
        output = weights.parents[2] / "eval" / f"{weights.parent.name}.json"
    else:
        output = weights.parent / "eval" / f"{weights.stem}.json"
    model = job.model
    if model is None and not beside.is_file():
        if not (weights.parent / CONFIG_FILE).is_file():
            raise ConfigError(
                f"checkpoint={job.checkpoint}: its architecture is not known: name it, as in model=vit_b_32"
            )
        model = ModelConfig(name=str(weights.parent / CONFIG_FILE))
    if model is None:
        stored = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), stored)
        model = OmegaConf.to_object(merged)
        assert isinstance(model, ModelConfig)
    return _with_weights(model, str(weights)), Path(job.output or output)


def _with_weights(model: ModelConfig, pretrained: str) -> ModelConfig:
    model.pretrained = pretrained
    return model


def _as_stored(job: EvalJob, model: ModelConfig) -> ModelConfig:
    """The architecture that lies beside the weights, settings included, unless the command names one: the JSON file
    that a run was given may be gone."""
    from clipq.model.weights import CONFIG_FILE

    stored = Path(model.pretrained or "").parent / CONFIG_FILE
    if job.model is not None or not stored.is_file():
        return model
    return ModelConfig(name=str(stored), pretrained=model.pretrained)


def write_results(
    output: Path, job: EvalJob, model: ModelConfig, results: list[EvalResult], facts: dict[str, Any]
) -> None:
    """Writes the results as JSON."""
    record = {
        "checkpoint": job.checkpoint,
        "model": model.name,
        "precision": job.backend.precision.value,
        "recipe": job.backend.recipe.value,
        "results": [{"task": r.task, "kind": r.kind, "metrics": r.metrics} for r in results],
        "environment": facts,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(results: list[EvalResult]) -> str:
    """A line for each metric of each task."""
    from clipq.eval.common import shown

    lines = []
    for result in results:
        for name, value in result.metrics.items():
            lines.append((result.task, name, shown(name, value)))
    widths = [max(len(row[i]) for row in [("task", "metric", "value"), *lines]) for i in range(3)]
    rows = [("task", "metric", "value"), tuple("-" * w for w in widths), *lines]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


if __name__ == "__main__":
    main()
