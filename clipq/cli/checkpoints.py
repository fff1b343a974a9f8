"""What `checkpoint=` of clipq-eval names: weights, their model, and where results go."""

from __future__ import annotations

import copy
import glob
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipq.config.checks import ConfigError
from clipq.config.evaluation import EvalConfig
from clipq.config.groups import ModelConfig
from clipq.config.schema import EvalJob

log = logging.getLogger("clipq.cli.eval")


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
    several = len(given) > 1 or any(map(_is_pattern, given))
    paths = list(dict.fromkeys(path for pattern in given for path in _matches(pattern)))
    names = [path.replace("/", "-") for path in paths]
    if all(Path(path).exists() for path in paths):
        names = distinct_names([Path(path).resolve() for path in paths])
    chosen: dict[str, Chosen] = {}
    for path, name in zip(paths, names, strict=True):
        model, output = resolve_checkpoint(job, path)
        output = _output(job.output, output, name, several=several)
        if (other := next((c for c in chosen.values() if c.output == output), None)) is not None:
            if other.model.pretrained == model.pretrained:
                continue  # the same by another name
            raise ConfigError(
                f"checkpoint={path}: its results would lie in {output}, where those of {other.name} do: name a folder "
                "by output=, or evaluate them one by one"
            )
        chosen[path] = Chosen(name if several else path, model, output)
    return list(chosen.values())


def _output(asked: str | None, usual: Path, name: str, *, several: bool) -> Path:
    """Where results go; a place where they could not is told before anything is evaluated.

    Raises:
        ConfigError: it is neither a JSON file nor a folder, or cannot be made.
    """
    output = usual
    if asked is not None:
        folder = several or asked.endswith("/") or Path(asked).is_dir()
        if not folder and not asked.endswith(".json"):
            raise ConfigError(f"output={asked}: expected a file that ends in .json, or a folder, which ends in /")
        output = Path(asked) / f"{name.replace('/', '-')}.json" if folder else Path(asked)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={asked}: {output.parent} cannot be made: {error.strerror}") from error
    return output


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).exists()


def _matches(pattern: str) -> list[str]:
    """Paths that a pattern stands for, but for those that hold no weights (yet)."""
    from clipq.model.weights import WeightsError, find_weights

    if not _is_pattern(pattern):
        return [pattern]
    found = []
    for path in sorted(glob.glob(pattern)):  # noqa: PTH207  absolute patterns too
        try:
            find_weights(path)
        except WeightsError:
            log.warning("checkpoint=%s: %s has no weights, and is passed over", pattern, path)
        else:
            if not Path(path).name.startswith("damaged_"):
                found.append(path)
    if not found:
        raise ConfigError(f"checkpoint={pattern}: nothing with weights matches this pattern")
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
        stored = _stored_model(beside)
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), stored)
        named = OmegaConf.to_object(merged)
        assert isinstance(named, ModelConfig)
    return _with_weights(named, str(weights)), output


def _stored_model(config: Path) -> Any:
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{config} is not of a clipq run ({error}): name the model, as in model=vit_b_32") from error


NO_TASKS = "eval has no tasks: choose a data set, as in eval=tiny_imagenet eval.root=/data/tiny_imagenet"


def with_tasks(config: EvalConfig, checkpoint: Any) -> EvalConfig:
    """The evaluation of a job; where it names no tasks, with those that the run of its one checkpoint has itself.

    Raises:
        ConfigError: that has none either.
    """
    from clipq.model.weights import WeightsError, find_weights

    if config.tasks:
        return config
    if not isinstance(checkpoint, str) or _is_pattern(checkpoint):
        raise ConfigError(f"{NO_TASKS}; only one checkpoint by its own name brings those of its run")
    if not Path(checkpoint).exists():
        raise ConfigError(f"checkpoint={checkpoint}: no such file or folder; and {NO_TASKS}")
    if config.root is not None:
        raise ConfigError(f"eval.root={config.root}: {NO_TASKS}; without eval= a run's own tasks are taken as they are")
    at = Path(checkpoint) / "config.yaml"  # of a run, and of a checkpoint
    try:
        at = at if at.is_file() else find_weights(Path(checkpoint)).parent / "config.yaml"
        stored = yaml.safe_load(at.read_text(encoding="utf-8"))["eval"]
        own = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EvalConfig), stored))
    except (WeightsError, FileNotFoundError):
        raise ConfigError(NO_TASKS) from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{NO_TASKS}; {at}: {type(error).__name__}: {error}") from error
    assert isinstance(own, EvalConfig)
    if not own.tasks:
        raise ConfigError(f"{NO_TASKS}; {at} has none either")
    log.info("evaluating on what the run names itself: %s", ", ".join(own.tasks))
    return replace(config, root=own.root, tasks=own.tasks, missing=own.missing, averages=own.averages)


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
