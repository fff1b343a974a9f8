"""The group `eval` of the configuration: which data sets a model is evaluated on, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipq.config.checks import require, strings
from clipq.config.choices import TaskKind
from clipq.config.data import CaptionConfig


@dataclass
class TaskConfig:
    kind: TaskKind = TaskKind.zero_shot
    """zero_shot (classification) or retrieval (image to text and back)."""
    shards: Any = None
    """Evaluation shards, as `data.shards`: members image + `cls`, or image + captions for retrieval."""
    folder: str | None = None
    """In place of shards: a folder of images, one sub-folder for each class in the order of their names."""
    benchmark: str | None = None
    """In place of shards: a data set in CLIP_benchmark's layout, a folder or an address, with class names, templates
    and what kind of task it is."""
    split: str = "test"
    """Of `benchmark`: the folder of its shards."""
    image: str = "jpg;jpeg;png;webp"
    """Member extensions that hold the image."""
    classnames: str | None = None
    """A file with a class name a line, line n naming class n; or `openclip:imagenet`. Goes before a benchmark's own."""
    templates: str | None = None
    """A file with a prompt template a line, `{}` or `{c}` for the class; or `openclip:imagenet` (80 templates), or
    `openclip:simple` (7)."""
    subsets: dict[str, str] = field(default_factory=dict)
    """Name -> file with a class name a line: the accuracy on those classes is reported too, scored against all."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """For retrieval: where captions are; every caption counts."""


@dataclass
class EvalConfig:
    root: str | None = None
    """Folder of the evaluation data, for tasks to refer to."""
    every: int = 0
    """Evaluate every so many steps; 0 evaluates at the end only."""
    batch_size: int = 256
    """Images at a time on each rank."""
    workers: int | None = None
    """Loader processes for each rank; None as `data.workers`."""
    examples: int = 12
    """Images of each task kept with their best captions for the report."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name -> what to evaluate."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every={self.every}: expected 0 or more steps")
        require(self.batch_size >= 1, f"eval.batch_size={self.batch_size}: expected 1 or more")
        for name, task in self.tasks.items():
            _check_task(f"eval.tasks.{name}", task)


def _check_task(where: str, task: TaskConfig) -> None:
    given = [name for name in ("shards", "folder", "benchmark") if getattr(task, name) is not None]
    require(len(given) == 1, f"{where}: set exactly one of shards=, folder= and benchmark=")
    if task.shards is not None:
        strings(f"{where}.shards", task.shards)
    if task.benchmark is not None:
        return
    if task.kind is TaskKind.zero_shot:
        require(
            task.classnames is not None,
            f"{where}.classnames is not set: name a file with a class name a line",
        )
        require(task.templates is not None, f"{where}.templates is not set: name a file with a template a line")
    else:
        require(task.folder is None, f"{where}.folder: retrieval reads shards, where captions stand beside images")
        require(
            isinstance(task.caption.field, str),
            f"{where}.caption.field={task.caption.field}: every caption of a field counts in an evaluation, none by "
            "chance: expected one field, 'txt' or 'json.NAME'",
        )
