"""The group `eval` of the configuration: what is evaluated, and the model as an evaluation sees it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from clipq.build_backend import AUTOCAST
from clipq.build_data import build_captions, interpolation
from clipq.config.checks import ConfigError
from clipq.config.choices import TaskKind
from clipq.config.groups import BackendConfig, EvalConfig, TaskConfig
from clipq.data.benchmark import CLASSNAMES, RETRIEVAL, TEMPLATES, BenchmarkSet
from clipq.data.decode import Captions
from clipq.data.evalset import EvalShards, ImageFolder, Source
from clipq.data.loader import default_workers
from clipq.data.shards import expand
from clipq.dist.env import DistEnv
from clipq.dist.shard import Sharded
from clipq.dist.stop import Stop
from clipq.eval.common import Encoder, Evaluator
from clipq.eval.linear_probe import LinearProbe
from clipq.eval.prompts import (
    checked_classnames,
    checked_templates,
    lines_of,
    read_classnames,
    read_templates,
    subset_indices,
)
from clipq.eval.retrieval import Retrieval
from clipq.eval.zero_shot import ZeroShot
from clipq.log.console import Console
from clipq.model.clip import ClipModel


def build_encoder(
    clip: ClipModel,
    backend: BackendConfig,
    config: EvalConfig,
    env: DistEnv,
    console: Console,
    stop: Stop | None = None,
    sharded: Sharded | None = None,
) -> Encoder:
    preprocess = clip.preprocess
    transform = image_transform(
        preprocess.size,
        is_train=False,
        mean=preprocess.mean,
        std=preprocess.std,
        interpolation=interpolation(preprocess),
        resize_mode=preprocess.resize_mode,  # pyright: ignore[reportArgumentType]
        fill_color=preprocess.fill_color,
    )
    return Encoder(
        model=clip.model,
        tokenizer=clip.tokenizer,
        transform=cast(Callable[[Image.Image], Tensor], transform),
        mean=preprocess.mean,
        std=preprocess.std,
        env=env,
        autocast=AUTOCAST[backend.precision],
        batch_size=config.batch_size,
        workers=default_workers(env.local_world_size) if config.workers is None else config.workers,
        status=console.status,
        whole=nullcontext if sharded is None else sharded.whole,
        stop=stop or Stop(),
    )


def build_evaluators(config: EvalConfig) -> list[Evaluator]:
    """The evaluators of the tasks, each of which has looked at its data."""
    evaluators = [_evaluator(name, task, config.examples) for name, task in config.tasks.items()]
    for evaluator in evaluators:
        evaluator.check()
    return evaluators


def _evaluator(name: str, task: TaskConfig, examples: int) -> Evaluator:
    if task.kind is TaskKind.linear_probe:
        return _linear_probe(name, task)
    if task.benchmark is not None:
        return _of_benchmark(name, task, BenchmarkSet(task.benchmark, task.split), examples)
    if task.kind is TaskKind.retrieval:
        source = EvalShards(expand(task.shards), build_captions(task.caption).all, task.image)
        return Retrieval(name, source, examples)
    assert task.classnames is not None  # the schema refuses such a task
    assert task.templates is not None
    classnames = read_classnames(task.classnames)
    if task.folder is not None:
        source = ImageFolder(task.folder)
        if len(source.classes()) != len(classnames):
            raise ConfigError(
                f"eval.tasks.{name}: {task.folder} has {len(source.classes())} sub-folders, but {task.classnames} "
                f"names {len(classnames)} classes: class n is the n-th sub-folder"
            )
    else:
        source = EvalShards(expand(task.shards), image=task.image)
    return ZeroShot(
        name,
        source,
        classnames,
        read_templates(task.templates),
        {subset: subset_indices(file, classnames) for subset, file in task.subsets.items()},
        examples,
    )


def _linear_probe(name: str, task: TaskConfig) -> LinearProbe:
    if task.benchmark is not None:
        test, train = (BenchmarkSet(task.benchmark, split) for split in (task.split, task.train_split))
        try:
            if test.kind() == RETRIEVAL:
                raise ConfigError(f"eval.tasks.{name}.kind=linear_probe: {task.benchmark} is a set for retrieval")
            sources = [EvalShards(data.shards(), image=task.image) for data in (train, test)]
        except FileNotFoundError as error:
            raise ConfigError(
                f"eval.tasks.{name}.benchmark={task.benchmark}: {error}. Expected nshards.txt, 0.tar … in both "
                f"{task.train_split} and {task.split}"
            ) from error
        return LinearProbe(name, *sources)
    if task.train_folder is not None and task.folder is not None:
        _check_folders(name, task.train_folder, task.folder)

    def source(shards: Any, folder: str | None) -> Source:
        return EvalShards(expand(shards), image=task.image) if folder is None else ImageFolder(folder)

    return LinearProbe(name, source(task.train_shards, task.train_folder), source(task.shards, task.folder))


def _check_folders(name: str, train: str, test: str) -> None:
    """Class n is the n-th sub-folder: one that only one of them has would move the classes after it."""
    first, second = ({path.name for path in ImageFolder(folder).classes()} for folder in (train, test))
    if first != second:
        odd = min(first ^ second)
        raise ConfigError(
            f"eval.tasks.{name}: {train} and {test} must have the same sub-folders, a class each; {odd!r} is in "
            f"{'the first' if odd in first else 'the second'} only"
        )


def _of_benchmark(name: str, task: TaskConfig, data: BenchmarkSet, examples: int) -> Evaluator:
    try:
        if data.kind() == RETRIEVAL:
            return Retrieval(name, EvalShards(data.shards(), Captions("txt", lines=True).all, task.image), examples)
        source = EvalShards(data.shards(), image=task.image)
        if task.classnames is None:
            where = data.where(CLASSNAMES)
            classnames = checked_classnames(lines_of(data.read(CLASSNAMES), where), where)
        else:
            classnames = read_classnames(task.classnames)
        if task.templates is None:
            where = data.where(TEMPLATES)
            templates = checked_templates(lines_of(data.read(TEMPLATES), where), where)
        else:
            templates = read_templates(task.templates)
    except FileNotFoundError as error:
        raise ConfigError(
            f"eval.tasks.{name}.benchmark={task.benchmark}: {error}. Expected {task.split}/nshards.txt, "
            f"{task.split}/0.tar … and, for classification, {CLASSNAMES} and {TEMPLATES}"
        ) from error
    subsets = {subset: subset_indices(file, classnames) for subset, file in task.subsets.items()}
    return ZeroShot(name, source, classnames, templates, subsets, examples)
