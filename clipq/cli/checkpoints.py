"""What `checkpoint=` of clipq-eval names: weights, their model, and where results go."""

from __future__ import annotations

import copy
import glob
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from clipq.config.checks import ConfigError
from clipq.config.groups import ModelConfig
from clipq.config.schema import EvalJob


@dataclass(frozen=True)
class Chosen:
    """One checkpoint that is to be evaluated."""

    name: str
    model: ModelConfig
    """With its weights."""
    output: Path


def choose(job: EvalJob) -> list[Chosen]:
    """The checkpoints of a job, by names that tell them apart.

    Raises:
        ConfigError: one of them is neither a run, a checkpoint nor a weights file, or weights without an architecture.
    """
    from clipq.report.runs import distinct_names

    given = [job.checkpoint] if isinstance(job.checkpoint, str) else job.checkpoint
    paths = list(dict.fromkeys(path for pattern in given for path in _matches(pattern)))
    names = [path.replace("/", "-") for path in paths]
    if all(Path(path).exists() for path in paths):
        names = distinct_names([Path(path).resolve() for path in paths])
    chosen = []
    for path, name in zip(paths, names, strict=True):
        model, output = resolve_checkpoint(job, path)
        if job.output is not None:
            output = Path(job.output)
            output = output if len(paths) == 1 else output / f"{name.replace('/', '-')}.json"
        chosen.append(Chosen(path if len(paths) == 1 else name, model, output))
    return chosen


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    found = sorted(glob.glob(pattern))  # noqa: PTH207  absolute patterns too
    if not found:
        raise ConfigError(f"checkpoint={pattern}: nothing matches this pattern")
    return found


def resolve_checkpoint(job: EvalJob, checkpoint: str) -> tuple[ModelConfig, Path]:
    """The model of a checkpoint with its weights, and where the results go unless the job says.

    Raises:
        ConfigError: neither a run, a checkpoint nor a weights file, or weights without an architecture.
    """
    from clipq.model.weights import CONFIG_FILE, find_weights

    path, named = Path(checkpoint), copy.deepcopy(job.model)
    if not path.exists():
        if named is None:
            raise ConfigError(
                f"checkpoint={checkpoint}: no such file or folder. For an OpenCLIP tag name the model too, as in "
                "model=vit_b_32 checkpoint=laion2b_s34b_b79k"
            )
        return _with_weights(named, checkpoint), Path("eval") / f"{named.name}-{checkpoint}.json"
    weights = find_weights(path)
    beside = weights.parent / "config.yaml"
    if weights.parent.parent.name == "checkpoints":
        output = weights.parents[2] / "eval" / f"{weights.parent.name}.json"
    else:
        output = weights.parent / "eval" / f"{weights.stem}.json"
    if named is None and not beside.is_file():
        if not (weights.parent / CONFIG_FILE).is_file():
            raise ConfigError(f"checkpoint={checkpoint}: its architecture is not known: name it, as in model=vit_b_32")
        named = ModelConfig(name=str(weights.parent / CONFIG_FILE))
    if named is None:
        stored = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), stored)
        named = OmegaConf.to_object(merged)
        assert isinstance(named, ModelConfig)
    return _with_weights(named, str(weights)), output


def _with_weights(model: ModelConfig, pretrained: str) -> ModelConfig:
    model.pretrained = pretrained
    return model


def as_stored(job: EvalJob, model: ModelConfig) -> ModelConfig:
    """The architecture that lies beside the weights, settings included, unless the command names one: the JSON file
    that a run was given may be gone."""
    from clipq.model.weights import CONFIG_FILE

    stored = Path(model.pretrained or "").parent / CONFIG_FILE
    if job.model is not None or not stored.is_file():
        return model
    return ModelConfig(name=str(stored), pretrained=model.pretrained)
