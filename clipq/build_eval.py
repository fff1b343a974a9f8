"""The group `eval` of the configuration: what is evaluated, and the model as an evaluation sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from clipq.build_backend import AUTOCAST
from clipq.build_data import build_captions, interpolation
from clipq.config.checks import ConfigError
from clipq.config.choices import MissingData, TaskKind
from clipq.config.evaluation import EvalConfig, TaskConfig
from clipq.config.groups import BackendConfig
from clipq.data.benchmark import CLASSNAMES, MULTILABEL, RETRIEVAL, TEMPLATES, BenchmarkSet
from clipq.data.captioned import captioned_files
from clipq.data.classes import class_numbers, labelled_files
from clipq.data.decode import Captions
from clipq.data.evalset import EvalShards, ImageFiles, ImageFolder, Source, label_of, labels_of
from clipq.data.loader import default_workers
from clipq.data.shards import expand
from clipq.dist.env import DistEnv
from clipq.dist.shard import Sharded
from clipq.dist.stop import Stop
from clipq.eval.common import Encoder, Evaluator
from clipq.eval.linear_probe import LinearProbe
from clipq.eval.multi_label import MultiLabel
from clipq.eval.prompts import (
    checked_classnames,
    checked_templates,
    lines_of,
    read_classnames,
    read_templates,
    require_all,
    subset_indices,
)
from clipq.eval.retrieval import Retrieval
from clipq.eval.zero_shot import ZeroShot
from clipq.log.console import Console
from clipq.model.clip import ClipModel

log = logging.getLogger(__name__)


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


def build_evaluators(config: EvalConfig) -> tuple[list[Evaluator], dict[str, str]]:
    """The evaluators of the tasks, each of which has looked at its data; and tasks whose data are not there -> why.

    Raises:
        ConfigError: data are not there, unless they may be missing; then none of them are.
        EvalError: data are there and cannot be used.
    """
    missing = {}
    if config.missing is MissingData.report:
        missing = {name: why for name, task in config.tasks.items() if (why := absent(task)) is not None}
    if missing and len(missing) == len(config.tasks):
        name, why = next(iter(missing.items()))
        raise ConfigError(f"eval.root={config.root}: none of the {len(missing)} data sets is there; {name}: {why}")
    evaluators = [
        build_evaluator(name, task, config.examples) for name, task in config.tasks.items() if name not in missing
    ]
    for evaluator in evaluators:
        evaluator.check()
    for name, why in missing.items():
        log.warning("evaluation %s is missing: %s", name, why)
    return evaluators, missing


def absent(task: TaskConfig) -> str | None:
    """Why the data of a task are not there; None where they are. Whether they can be used is another matter."""
    splits = [task.split, *([task.train_split] if task.kind is TaskKind.linear_probe else [])]
    try:
        if task.benchmark is not None:
            for split in splits:
                BenchmarkSet(task.benchmark, split).shards()
        for shards in (task.shards, task.train_shards):
            if shards is not None:
                expand(shards)
    except FileNotFoundError as error:
        return str(error) if error.filename is None else f"{error.filename}: there is none"
    except PermissionError as error:  # what the hub answers for a data set that there is none of
        return str(error)
    named = (task.folder, task.labels, task.annotations, task.train_folder)
    return next((f"{path}: there is none" for path in named if path and not Path(path).expanduser().exists()), None)


def build_evaluator(name: str, task: TaskConfig, examples: int) -> Evaluator:
    if task.kind is TaskKind.linear_probe:
        return _linear_probe(name, task)
    if task.benchmark is not None:
        return _of_benchmark(name, task, BenchmarkSet(task.benchmark, task.split), examples)
    if task.kind is TaskKind.retrieval:
        return Retrieval(name, _captioned(name, task), examples, task.max_captions)
    assert task.classnames is not None  # the schema refuses such a task
    assert task.templates is not None
    classnames = read_classnames(task.classnames)
    templates = read_templates(task.templates)
    if task.kind is TaskKind.multi_label:
        require_all(templates, classnames, task.templates)
        return MultiLabel(name, EvalShards(expand(task.shards), labels_of, task.image), classnames, templates, examples)
    if task.folder is None:
        source = EvalShards(expand(task.shards), image=task.image)
    else:
        source, classnames = _classified_files(name, task, classnames)
    require_all(templates, classnames, task.templates)
    subsets = {subset: subset_indices(file, classnames) for subset, file in task.subsets.items()}
    return ZeroShot(name, source, classnames, templates, subsets, examples)


def _captioned(name: str, task: TaskConfig) -> Source:
    if task.folder is None:
        settings = ("caption.field", "image", "shards")
        return EvalShards(expand(task.shards), build_captions(task.caption).all, task.image, settings)
    assert task.annotations is not None  # the schema refuses such a task
    with _saying(f"eval.tasks.{name}.annotations={task.annotations}"):
        files = captioned_files(task.annotations, task.folder, task.split)
    return ImageFiles(files, ("folder", "annotations"))


def _classified_files(name: str, task: TaskConfig, classnames: list[str]) -> tuple[Source, list[str]]:
    """The images of a folder, and the names of the classes that they are scored against."""
    assert task.folder is not None
    files: list[tuple[str, str]] = []
    if task.labels is None:
        folder = ImageFolder(task.folder)
        # of an empty folder there is nothing to score, and no class to take an image for
        names = [path.name for path in folder.classes() if not task.present_only or folder.images(path)]
    else:
        with _saying(f"eval.tasks.{name}.labels={task.labels}"):
            files = labelled_files(task.labels, task.folder)
        names = [label for _, label in files]
    with _saying(f"eval.tasks.{name}.class_ids={task.class_ids}, {task.labels or task.folder}"):
        numbers = class_numbers(names, task.class_ids, classnames)
    present = sorted(set(numbers.values()))
    if task.present_only:
        classnames = [classnames[c] for c in present]
        numbers = {key: present.index(c) for key, c in numbers.items()}
    elif len(present) < len(classnames):
        log.warning("eval.tasks.%s: only %d of %d classes are there", name, len(present), len(classnames))
    if task.labels is None:
        return ImageFolder(task.folder, numbers), classnames
    return ImageFiles([(path, numbers[label]) for path, label in files], ("folder", "labels")), classnames


@contextmanager
def _saying(setting: str) -> Iterator[None]:
    """A mistake in what a setting names is told with the setting."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{setting}: {error}") from error


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
        kind, settings = data.kind(), ("benchmark", "split", "image")
        if kind == RETRIEVAL:
            captions = Captions("txt", lines=True).all
            source = EvalShards(data.shards(), captions, task.image, settings)
            return Retrieval(name, source, examples, task.max_captions)
        if task.max_captions is not None:
            raise ConfigError(f"eval.tasks.{name}.max_captions={task.max_captions}: {task.benchmark} is no retrieval")
        source = EvalShards(data.shards(), labels_of if kind == MULTILABEL else label_of, task.image, settings)
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
            require_all(templates, classnames, task.templates)
    except FileNotFoundError as error:
        raise ConfigError(
            f"eval.tasks.{name}.benchmark={task.benchmark}: {error}. Expected {task.split}/nshards.txt, "
            f"{task.split}/0.tar … and, for classification, {CLASSNAMES} and {TEMPLATES}"
        ) from error
    if kind == MULTILABEL:
        if task.subsets:
            raise ConfigError(f"eval.tasks.{name}.subsets: {task.benchmark} is multilabel, which has no accuracy")
        return MultiLabel(name, source, classnames, templates, examples)
    subsets = {subset: subset_indices(file, classnames) for subset, file in task.subsets.items()}
    return ZeroShot(name, source, classnames, templates, subsets, examples)
