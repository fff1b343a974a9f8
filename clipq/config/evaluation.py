"""The group `eval` of the configuration: which data sets a model is evaluated on, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipq.config.checks import require, strings
from clipq.config.choices import MissingData, TaskKind
from clipq.config.data import CaptionConfig


@dataclass
class TaskConfig:
    kind: TaskKind = TaskKind.zero_shot
    """zero_shot (classification), retrieval (image to text and back), multi_label (classification of images that show
    several classes), or linear_probe (a linear classifier of the image features, fitted to training images; takes
    scikit-learn: clipq[probe]). A `benchmark` says itself which of the first three it is."""
    shards: Any = None
    """Evaluation shards, as `data.shards`: members image + `cls`, or image + captions for retrieval, or image + `npy`
    (an array of 0 and 1, one for each class) for multi_label."""
    folder: str | None = None
    """In place of shards: a folder of images, one sub-folder for each class; or of images that `labels` or
    `annotations` speak of."""
    class_ids: str = "position"
    """How sub-folders of `folder`, or the entries of `labels`, name classes. position: class n is the n-th sub-folder
    in the order of names; number: by its number, from 0; imagenet: by its WordNet id, of ImageNet's 1000 classes; or a
    file with such a name a line, line n naming class n."""
    present_only: bool = False
    """Of `folder`: score images against the classes alone that are there, as is usual for ImageNet-A and -R with 200 of
    ImageNet's 1000 classes."""
    labels: str | None = None
    """Of `folder` with no sub-folders for classes: a file with lines of file name and class, or with a class a line in
    the order of file names, or Kaggle's LOC_val_solution.csv."""
    annotations: str | None = None
    """Of `folder`, for retrieval: a JSON file with the captions, as COCO's captions_val2014.json or Karpathy's
    dataset_coco.json and dataset_flickr30k.json."""
    benchmark: str | None = None
    """In place of shards: a data set in CLIP_benchmark's layout, a folder or an address, with class names, templates
    and what kind of task it is."""
    split: str = "test"
    """Of `benchmark`: the folder of its shards; of Karpathy's `annotations`: which of the images."""
    train_shards: Any = None
    """For linear_probe: training shards, as `shards`."""
    train_folder: str | None = None
    """For linear_probe, in place of train_shards: a folder with one sub-folder for each class, as `folder`."""
    train_split: str = "train"
    """For linear_probe, of `benchmark`: the folder of its training shards."""
    image: str = "jpg;jpeg;png;webp"
    """Member extensions that hold the image."""
    classnames: str | None = None
    """A file with a class name a line, line n naming class n; or `openclip:imagenet`. Goes before a benchmark's own."""
    templates: str | None = None
    """A file with a prompt template a line, `{}` or `{c}` for the class; or `openclip:imagenet` (80 templates), or
    `openclip:simple` (7); or a `.json` file with sentences of each class: {class name: [sentence, …]}."""
    subsets: dict[str, str] = field(default_factory=dict)
    """Name -> file with a class name a line: the accuracy on those classes is reported too, scored against all."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """For retrieval: where captions are; every caption counts."""
    max_captions: int | None = None
    """For retrieval: at most so many captions of an image, the first ones; None for all."""


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
    missing: MissingData = MissingData.error
    """What a task whose data are not there is: an error, or (suites) told in the results as missing."""
    averages: dict[str, list[str]] = field(default_factory=dict)
    """Name -> tasks: the mean of their main metrics (`clipq-eval`), which says how many of them it is of."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every={self.every}: expected 0 or more steps")
        require(self.batch_size >= 1, f"eval.batch_size={self.batch_size}: expected 1 or more")
        for name, task in self.tasks.items():
            _check_task(f"eval.tasks.{name}", task)
        for name, tasks in self.averages.items():
            unknown = [task for task in tasks if task not in self.tasks]
            require(bool(tasks) and not unknown, f"eval.averages.{name}={tasks}: expected names of eval.tasks")


def _check_task(where: str, task: TaskConfig) -> None:
    given = [name for name in ("shards", "folder", "benchmark") if getattr(task, name) is not None]
    require(
        len(given) == 1,
        f"{where}: set exactly one of shards=, folder= and benchmark= (presets take theirs from eval.root)",
    )
    if task.shards is not None:
        strings(f"{where}.shards", task.shards)
    _check_folder(where, task)
    _check_training(where, task)
    _check_unused(where, task)
    require(
        not task.subsets or task.kind is not TaskKind.multi_label,
        f"{where}.subsets: kind=multi_label has no accuracy on some of the classes",
    )
    require(
        task.max_captions is None or (task.max_captions >= 1 and not _classifies(task)),
        f"{where}.max_captions={task.max_captions}: expected 1 or more, of a task of kind=retrieval, or null for all",
    )
    if task.benchmark is not None:
        return
    if _classifies(task):
        require(
            task.classnames is not None,
            f"{where}.classnames is not set: name a file with a class name a line",
        )
        require(task.templates is not None, f"{where}.templates is not set: name a file with a template a line")
    elif task.kind is TaskKind.retrieval:
        require(
            isinstance(task.caption.field, str),
            f"{where}.caption.field={task.caption.field}: every caption of a field counts in an evaluation, none by "
            "chance: expected one field, 'txt' or 'json.NAME'",
        )


def _classifies(task: TaskConfig) -> bool:
    """A benchmark says itself what it is."""
    return task.benchmark is None and task.kind in (TaskKind.zero_shot, TaskKind.multi_label)


def _check_unused(where: str, task: TaskConfig) -> None:
    """Refuses what would be left unread."""
    if task.benchmark is None:
        for name in ("classnames", "templates"):
            value = getattr(task, name)
            require(
                value is None or _classifies(task),
                f"{where}.{name}={value}: kind={task.kind.value} has no class names: leave it out",
            )
        require(
            task.split == "test" or task.annotations is not None,
            f"{where}.split={task.split}: it is of a benchmark, or of Karpathy's annotations",
        )
    require(
        task.train_split == "train" or (task.benchmark is not None and task.kind is TaskKind.linear_probe),
        f"{where}.train_split={task.train_split}: it is for kind=linear_probe with benchmark=",
    )


def _check_training(where: str, task: TaskConfig) -> None:
    given = [name for name in ("train_shards", "train_folder") if getattr(task, name) is not None]
    if task.kind is not TaskKind.linear_probe:
        require(not given, f"{where}.{given and given[0]} with {where}.kind={task.kind.value}: it is for linear_probe")
        return
    require(not task.subsets, f"{where}.subsets: they are for zero_shot; a linear probe knows no class names")
    require(task.max_captions is None, f"{where}.max_captions={task.max_captions}: it is for retrieval")
    if task.benchmark is not None:
        require(not given, f"{where}.{given and given[0]} with {where}.benchmark: set {where}.train_split")
        require(
            task.train_split != task.split,
            f"{where}.train_split={task.train_split}: the split that the probe is tested on",
        )
        return
    require(len(given) == 1, f"{where}: a linear probe is fitted: set exactly one of train_shards= and train_folder=")
    if task.train_shards is not None:
        strings(f"{where}.train_shards", task.train_shards)


def _check_folder(where: str, task: TaskConfig) -> None:
    """What belongs to `folder` alone."""
    of_classes = task.folder is not None and task.kind is TaskKind.zero_shot
    require(
        task.folder is None or task.kind is not TaskKind.multi_label,
        f"{where}.folder={task.folder} with kind=multi_label: an image in a folder has one class: set shards=",
    )
    for name, default in (("class_ids", "position"), ("present_only", False), ("labels", None)):
        value = getattr(task, name)
        require(
            value == default or of_classes,
            f"{where}.{name}={str(value).lower() if value is True else value}: it is for kind=zero_shot with folder=",
        )
    require(
        not task.present_only or task.class_ids != "position",
        f"{where}.present_only=true with class_ids=position: which classes are there is not to be seen from the place "
        "of a sub-folder: set class_ids to imagenet, number, or a file with a name a line",
    )
    require(
        task.labels is None or task.class_ids != "position",
        f"{where}.labels={task.labels}: set class_ids to what it names classes by: imagenet (WordNet ids), number "
        "(class numbers from 0), or a file with a name a line",
    )
    require(
        task.annotations is None or (task.folder is not None and task.kind is TaskKind.retrieval),
        f"{where}.annotations={task.annotations}: it is for kind=retrieval with folder=, the folder of its images",
    )
    require(
        task.folder is None or task.kind is not TaskKind.retrieval or task.annotations is not None,
        f"{where}.folder={task.folder} with kind=retrieval: set annotations to a JSON file with the captions of its "
        "images, or shards= in place of folder=",
    )
