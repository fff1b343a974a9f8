"""Reads run folders: what `clipq-train` wrote, as arrays and plain values.

A run folder may be read at any moment: while it is written, after a kill that left half a line, after a
resume that wrote some steps again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

METRICS = "metrics.jsonl"
COLUMNS = (
    "step",
    "samples",
    "seconds",
    "loss",
    "lr",
    "logit_scale",
    "grad_norm",
    "images_per_second",
    "data_wait",
    "memory_gib",
    "mfu",
)


class RunError(ValueError):
    """A path is not a run folder, or the run has nothing to report; the message says how to mend it."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one task."""

    step: int
    seconds: float
    """Training wall time since the run began, NaN where it was not written."""
    metrics: dict[str, float]
    """Shares in [0, 1] (`top1`, `chance`, `image_to_text_r1`, …) and counts (`images`, `texts`)."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a step, as the run told it."""

    step: int
    name: str
    """`bad step`, `rewind`, `gradient overflow`, `failed save`."""
    text: str


@dataclass(frozen=True)
class Example:
    """One evaluated image."""

    image: str
    """A `data:` URI, as found: not yet checked."""
    truth: tuple[str, ...]
    """Every caption that would be right."""
    best: tuple[tuple[str, float], ...]
    """The captions that the model finds most probable with their scores, best first."""


@dataclass(frozen=True)
class ExampleSet:
    """What `examples/<task>.json` holds."""

    task: str
    step: int | None
    kind: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    name: str
    train: dict[str, np.ndarray]
    """One float64 array [rows] for each of `COLUMNS`, in the order of steps; NaN where a row lacks it."""
    evaluations: dict[str, tuple[Evaluation, ...]]
    """For each task, in the order of steps."""
    rms: dict[str, np.ndarray]
    """RMS_t of each watched parameter, float64 [rows] beside `train`; NaN where a step was not watched."""
    events: tuple[Event, ...]
    """In the order of the file, those of steps that a rewind gave up included."""
    resumes: tuple[tuple[int, float], ...]
    """(step, seconds) of each resume that the present curve went through."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    examples: tuple[ExampleSet, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the report should know: lines that could not be read, losses that are not finite."""

    @property
    def last_step(self) -> int:
        return int(self.train["step"][-1])


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads each run folder once, in the order given; equal folder names are told apart by their parents.

    Raises:
        RunError: no path is given, a path is not a run folder, or a run has no training rows yet.
    """
    if not paths:
        raise RunError("no run folder is given: name at least one, as in runs/my-run")
    unique = list({path.resolve(): path for path in paths}.values())
    names = distinct_names([path.resolve() for path in unique])
    return [read_run(path, name=name) for path, name in zip(unique, names, strict=True)]


def read_run(path: Path, *, name: str | None = None) -> Run:
    """Reads the run folder `path`; `name` defaults to the folder's.

    Later rows win over earlier ones of the same step, and a resume at step n discards what was written beyond
    n: that belongs to a curve that the run did not continue.

    Raises:
        RunError: `path` is not a run folder, or it has no training rows yet.
    """
    _require_run_folder(path)
    log = _read_metrics(path / METRICS)
    _add_followed(log, path / "eval" / METRICS)
    if log.count == 0:
        raise RunError(
            f"{path} has no training rows yet: its {METRICS} holds no readable line of kind 'train'. "
            "Each training step writes one; try again once the run has begun"
        )
    rows, notes = log.rows(), log.notes()
    train = log.table(rows)
    config, config_notes = _read_config(path / "config.yaml")
    environment, environment_notes = _read_object(path / "environment.json")
    examples, example_notes = _read_examples(path / "examples")
    return Run(
        path=path,
        name=name or path.resolve().name,
        train=train,
        evaluations=log.evaluation_table(),
        rms=log.rms_table(rows),
        events=tuple(log.events),
        resumes=tuple(log.resumes),
        config=config,
        environment=environment,
        examples=examples,
        notes=(*notes, *_loss_notes(train), *config_notes, *environment_notes, *example_notes),
    )


def distinct_names(resolved: list[Path]) -> list[str]:
    """The shortest tails of the paths, at most the whole, that differ from each other."""
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def _require_run_folder(path: Path) -> None:
    if not path.exists():
        raise RunError(f"{path} does not exist: expected a run folder, as runs/<name> that clipq-train writes")
    if not path.is_dir():
        raise RunError(f"{path} is a file: expected the run folder that holds it, as runs/<name>")
    if (path / METRICS).is_file():
        return
    inside = sorted(child.parent.name for child in path.glob(f"*/{METRICS}"))
    names = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "")
    hint = f"; it holds {len(inside)} of them ({names}): name those" if inside else ""
    raise RunError(
        f"{path} is not a run folder: it has no {METRICS}. A run folder is runs/<name>, "
        f"where clipq-train writes {METRICS}, config.yaml and checkpoints/{hint}"
    )


class _Log:
    """What has been read of one metrics file so far."""

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {column: [] for column in COLUMNS}
        self.rms: list[dict[str, Any]] = []  # of each row
        self.events: list[Event] = []
        self.cuts: list[tuple[int, int]] = []  # (rows before a resume or rewind, step that it went on from)
        self.resumes: list[tuple[int, float]] = []
        self.evaluations: dict[tuple[str, int], Evaluation] = {}
        self.broken: list[int] = []

    @property
    def count(self) -> int:
        return len(self.columns["step"])

    def add(self, row: dict[str, Any]) -> bool:
        """Takes one row in; False where the row is not one that clipq writes."""
        kind, step = row.get("kind"), row.get("step")
        if not isinstance(kind, str) or not isinstance(step, int) or isinstance(step, bool):
            return False
        if kind == "train":
            for column, values in self.columns.items():
                values.append(_number(row.get(column)))
            rms = row.get("rms")
            self.rms.append(rms if isinstance(rms, dict) else {})
        elif kind == "event":
            self._event(step, row)
        elif kind == "resume":
            self._resume(step, _number(row.get("seconds")))
        elif kind == "eval":
            task, metrics = row.get("task"), row.get("metrics")
            if not isinstance(task, str) or not isinstance(metrics, dict):
                return False
            numbers = {str(k): _number(v) for k, v in metrics.items() if isinstance(v, int | float)}
            self.evaluations[task, step] = Evaluation(step, _number(row.get("seconds")), numbers)
        return True  # a kind that this version does not know is no fault of the file

    def _resume(self, step: int, seconds: float) -> None:
        self._go_back(step)
        self.resumes.append((step, seconds))

    def _go_back(self, step: int) -> None:
        """What was written beyond this step belongs to a curve that the run did not continue."""
        self.cuts.append((self.count, step))
        self.resumes = [(s, t) for s, t in self.resumes if s <= step]
        self.evaluations = {key: e for key, e in self.evaluations.items() if e.step <= step}

    def _event(self, step: int, row: dict[str, Any]) -> None:
        name, to, parameters = row.get("event"), row.get("to"), row.get("parameters")
        if name == "rewind" and isinstance(to, int) and not isinstance(to, bool) and 0 <= to <= step:
            self._go_back(to)
            self.events.append(Event(step, name, f"went back to step {to:,}"))
        elif name == "bad step":
            reason, tensor, keys = (v if isinstance(v := row.get(k), str) else "" for k in ("reason", "tensor", "keys"))
            where = f", first in {tensor}" if tensor else ""
            samples = f"; samples in {keys}" if keys else ""
            self.events.append(Event(step, name, f"{reason or 'no reason given'}{where}{samples}"))
        elif name in ("failed save", "failed upload"):
            self.events.append(Event(step, name, str(row.get("reason"))))
        elif name == "gradient overflow" and isinstance(parameters, list):
            self.events.append(Event(step, name, ", ".join(map(str, parameters[:5])) + ", …" * (len(parameters) > 5)))

    def rows(self) -> np.ndarray:
        """Indices of the rows of the curve that the run continued, in the order of steps."""
        step = np.asarray(self.columns["step"], np.float64)
        alive = np.ones(len(step), bool)
        for rows, at in self.cuts:
            alive[:rows] &= step[:rows] <= at
        if not alive.any():  # resumed before the first step was written again: the old rows say more than none
            alive[:] = True
        (kept,) = alive.nonzero()
        # np.unique reports the first occurrence: of the reversed steps that is the row written last.
        _, first = np.unique(step[kept][::-1], return_index=True)
        return kept[len(kept) - 1 - first]

    def table(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {column: np.asarray(values, np.float64)[rows] for column, values in self.columns.items()}

    def rms_table(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        kept = [self.rms[i] for i in rows]
        names = dict.fromkeys(str(name) for rms in kept for name in rms)
        return {name: np.asarray([_number(rms.get(name)) for rms in kept], np.float64) for name in names}

    def evaluation_table(self) -> dict[str, tuple[Evaluation, ...]]:
        tasks: dict[str, list[Evaluation]] = {}
        for (task, _), evaluation in self.evaluations.items():
            tasks.setdefault(task, []).append(evaluation)
        return {task: tuple(sorted(tasks[task], key=lambda e: e.step)) for task in sorted(tasks)}

    def notes(self) -> list[str]:
        if not self.broken:
            return []
        where = ", ".join(str(n) for n in self.broken[:5]) + (", …" if len(self.broken) > 5 else "")
        lines = "1 line" if len(self.broken) == 1 else f"{len(self.broken)} lines"
        return [f"{lines} of {METRICS} could not be read and {_were(self.broken)} left out (line {where})"]


def _were(things: list[int]) -> str:
    return "was" if len(things) == 1 else "were"


def _number(value: Any) -> float:
    """A JSON value as a float; NaN for null and for what is no number."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer beyond the range of a float
        return math.nan


def _read_metrics(path: Path) -> _Log:
    log = _Log()
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            ended = line.endswith("\n")
            known = [log.add(row) for row in _rows(line)]
            # A last line without its end is being written, or a kill cut it: no fault worth a note.
            if not (known and all(known)) and ended:
                log.broken.append(number)
    return log


def _add_followed(log: _Log, path: Path) -> None:
    """Evaluations by `clipq-eval follow=true`, which has a file of its own, of steps that the run knows."""
    if path.is_file():
        seconds = dict(zip(log.columns["step"], log.columns["seconds"], strict=True))
        for key, found in _read_metrics(path).evaluations.items():
            if found.step in seconds:
                log.evaluations[key] = replace(found, seconds=seconds[found.step])


def _rows(line: str) -> Iterator[dict[str, Any]]:
    """The row of a line; where a kill cut a row and the resumed run went on in the same line, the second."""
    starts = [0, line.rfind('{"kind"')]
    for start in starts[: 1 if starts[1] <= 0 else 2]:
        try:
            row = json.loads(line[start:])
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row
        return


def _loss_notes(train: dict[str, np.ndarray]) -> list[str]:
    bad = train["step"][~np.isfinite(train["loss"])]
    if not len(bad):
        return []
    steps = f"{len(bad):,} of {len(train['step']):,} steps"
    return [f"the loss is not finite at {steps}, first at step {int(bad[0]):,}"]


def _read_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, empty where the file is absent; a note where it cannot be read."""
    if not path.is_file():
        return {}, []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, [f"{path.name} could not be read: {error}"]
    if not isinstance(value, dict):
        return {}, [f"{path.name} could not be read: expected a JSON object"]
    return value, []


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file():
        return {}, []
    # OmegaConf reads 1e-4 as a number, which plain YAML 1.1 does not.
    from omegaconf import OmegaConf

    try:
        value = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML and OmegaConf raise kinds that share no base
        return {}, [f"{path.name} could not be read: {str(error).splitlines()[0] if str(error) else error!r}"]
    if not isinstance(value, dict):
        return {}, [f"{path.name} could not be read: expected settings, name: value"]
    return {str(key): item for key, item in value.items()}, []


def _read_examples(folder: Path) -> tuple[tuple[ExampleSet, ...], list[str]]:
    sets: list[ExampleSet] = []
    notes: list[str] = []
    for path in sorted(folder.glob("*.json")):
        value, problems = _read_object(path)
        notes += [f"examples/{problem}" for problem in problems]
        try:
            if value:
                sets.append(_example_set(value, task=path.stem))
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"examples/{path.name} could not be read: {type(error).__name__}: {error}")
    return tuple(sets), notes


def _example_set(value: dict[str, Any], *, task: str) -> ExampleSet:
    step = value.get("step")
    return ExampleSet(
        task=str(value.get("task", task)),
        step=step if isinstance(step, int) else None,
        kind=str(value.get("kind", "")),
        examples=tuple(example_of(item) for item in value["examples"]),
    )


def example_of(item: dict[str, Any]) -> Example:
    """An image as an evaluation writes it: {"image", "truth", "best"}; KeyError, TypeError or ValueError otherwise."""
    truth = item["truth"]
    return Example(
        image=str(item["image"]),
        truth=tuple(str(t) for t in truth) if isinstance(truth, list) else (str(truth),),
        best=tuple((str(caption), float(score)) for caption, score in item["best"]),
    )
