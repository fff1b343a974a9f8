"""The numbers of a report: what runs reached, how fast they were, what sets them apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipq.report.runs import Evaluation, Run

_SHARE = re.compile(r"(?:^|_)(?:top\d+|r\d+|mean_per_class|mean_average_precision|chance)$")
_COUNT = re.compile(r"(?:^|_)(?:images|texts|classes|failed|broken_shards)$")
_NAME_SETTINGS = ("name", "runs")
"""Settings that say where a run lies, not what it does: that they differ is no news."""


@dataclass(frozen=True)
class Quantity:
    """One line of the comparison of runs."""

    key: str
    """Column of the CSV table: `final_loss`, `shapes/top1`."""
    label: str
    group: str
    """Heading that the line stands under."""
    values: tuple[float | None, ...]
    """One for each run; None where the run has no such value."""
    show: Callable[[float], str]
    better: int = 0
    """1: higher is better, -1: lower is better, 0: neither."""
    detail: str = ""
    """How the number is made, for a reader who asks."""

    def text(self, index: int) -> str:
        """The value of run `index` for people; a dash where there is none."""
        value = self.values[index]
        return "—" if value is None else self.show(value)

    def best(self) -> set[int]:
        """Runs that hold the best value as it is shown; empty where runs do not differ or none is better."""
        present = {i: v for i, v in enumerate(self.values) if v is not None and math.isfinite(v)}
        if not self.better or len({self.show(v) for v in present.values()}) < 2:
            return set()
        top = self.show(max(present.values()) if self.better > 0 else min(present.values()))
        return {i for i, v in present.items() if self.show(v) == top}


def compare(runs: Sequence[Run]) -> list[Quantity]:
    """Every line that some run has a value for: accuracy task by task, then training, speed and size."""
    lines = _accuracy(runs)
    for group, measures in _MEASURES.items():
        for key, label, measure, show, better, detail in measures:
            values = tuple(None if (value := measure(run)) is None else float(value) for run in runs)
            # A contrastive loss depends on the batch: those of two sizes do not compare.
            comparable = key != "final_loss" or len({batch_size(run) for run in runs}) == 1
            lines.append(Quantity(key, label, group, values, show, better if comparable else 0, detail))
    return [line for line in lines if any(value is not None for value in line.values)]


def primary_metrics(metrics: Sequence[str]) -> list[str]:
    """The metrics of a task that a curve is drawn for, most important first.

    Top-1 and its subsets (`<subset>_top1`) for classification, recall at 1 both ways for retrieval; all
    shares where a task has neither.
    """
    if "top1" in metrics:
        return ["top1", *sorted(m for m in metrics if m.endswith("_top1"))]
    first = [m for m in ("image_to_text_r1", "text_to_image_r1") if m in metrics]
    return first or [m for m in metrics if is_share(m) and not is_chance(m)]


def is_share(metric: str) -> bool:
    return _SHARE.search(metric) is not None


def is_chance(metric: str) -> bool:
    return metric == "chance" or metric.endswith("_chance")


def metric_label(metric: str) -> str:
    """`unseen_combinations_top1` -> `unseen combinations top-1`, `image_to_text_r5` -> `image → text R@5`."""
    text = metric.replace("_to_", " → ").replace("_", " ")
    text = re.sub(r"\btop(\d+)$", r"top-\1", text)
    return re.sub(r"\br(\d+)$", r"R@\1", text)


def chance_of(metric: str, metrics: dict[str, float]) -> float | None:
    """What guessing reaches on `metric`, where it is known: a subset's own chance, else the task's."""
    if metric != "mean_average_precision" and not metric.endswith("top1"):
        return None
    return metrics.get(metric.removesuffix("top1") + "chance", metrics.get("chance"))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name, values as one line of text; an empty group is kept as `{}`."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten({str(k): v for k, v in value.items()}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat


def settings(runs: Sequence[Run]) -> list[tuple[str, tuple[str | None, ...], bool]]:
    """(name, value in each run, whether runs differ) of every setting, in the order of the configurations.

    Runs without a configuration have None everywhere and do not count as different.
    """
    flats = [flatten(run.config) for run in runs]
    names = list(dict.fromkeys(name for flat in flats for name in flat))
    rows = []
    for name in names:
        values = tuple(flat.get(name) for flat in flats)
        known = {value for value, flat in zip(values, flats, strict=True) if flat}
        rows.append((name, values, len(known) > 1 and name not in _NAME_SETTINGS))
    return rows


def planned_steps(run: Run) -> int | None:
    """Steps that the configuration asks for, where it asks for more than have been run."""
    steps = run.config.get("steps")
    return steps if isinstance(steps, int) and steps > run.last_step else None


def batch_size(run: Run) -> float:
    """Pairs in one step over all ranks, as the samples counted show; NaN where they were not written."""
    return round(float(run.train["samples"][-1]) / max(1, run.last_step), 3)


def final_window(run: Run) -> int:
    """Last rows that the final loss is the mean of: a single step's loss is mostly noise."""
    return max(1, min(100, len(run.train["loss"]) // 20))


def final_loss(run: Run) -> float:
    """Mean loss over the last twentieth of the steps, at most 100; NaN or infinite if one of them is."""
    return float(run.train["loss"][-final_window(run) :].mean())


def wait_share(run: Run) -> float | None:
    """Share of the time in which the device waited for data: each logged share weighted by the time it covers."""
    wait, rate, samples = (run.train[c] for c in ("data_wait", "images_per_second", "samples"))
    logged = np.isfinite(wait) & np.isfinite(rate) & np.isfinite(samples) & (rate > 0)
    if not logged.any():
        return None
    seconds = np.diff(samples[logged], prepend=0.0) / rate[logged]
    if seconds.sum() <= 0:
        return float(wait[logged].mean())
    return float((wait[logged] * seconds).sum() / seconds.sum())


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "not finite"


def count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "not finite"


def decimal(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def duration(seconds: float) -> str:
    """`42.0 s`, `4 min 12 s`, `2 h 05 min`, `3 d 04 h`."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(round(seconds / 60), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if hours < 48:
        return f"{hours} h {minutes_left:02d} min"
    days, hours_left = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours_left:02d} h"


def scaled(value: float) -> str:
    """Large counts with a unit: `151.3 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return decimal(value)


def _loss_text(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _logged(column: str, pick: Callable[[np.ndarray], Any]) -> Callable[[Run], float | None]:
    """Reads one number off the finite values of a column; None where there are none."""

    def measure(run: Run) -> float | None:
        values = run.train[column][np.isfinite(run.train[column])]
        return float(pick(values)) if len(values) else None

    return measure


def _recorded(key: str) -> Callable[[Run], float | None]:
    """Reads a number of `environment.json`; None where it is absent."""

    def measure(run: Run) -> float | None:
        value = run.environment.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    return measure


def _final(values: np.ndarray) -> float:
    return values[-1]


# key, label, measure, text, which is better, detail
_Measure = tuple[str, str, Callable[[Run], float | None], Callable[[float], str], int, str]
_MEASURES: dict[str, tuple[_Measure, ...]] = {
    "Training": (
        (
            "final_loss",
            "final loss",
            final_loss,
            _loss_text,
            -1,
            "mean of the last 5 % of steps, at most 100",
        ),
        ("steps", "steps", lambda run: run.last_step, count, 0, ""),
        ("planned_steps", "steps planned", planned_steps, count, 0, ""),
        ("samples", "images seen", _logged("samples", _final), scaled, 0, ""),
        ("seconds", "training time", _logged("seconds", _final), duration, 0, "summed over resumes"),
        ("resumes", "resumes", lambda run: len(run.resumes) or None, count, 0, ""),
    ),
    "Speed": (
        ("images_per_second", "images/s", _logged("images_per_second", np.median), count, 1, "median"),
        ("data_wait", "waiting for data", wait_share, percent, -1, "share of the time, of the device"),
        ("mfu", "MFU", _logged("mfu", np.median), percent, 1, "model FLOPs utilization, median"),
        ("memory_gib", "memory (GiB)", _logged("memory_gib", np.max), decimal, -1, "highest logged"),
    ),
    "Model": (
        ("parameters", "parameters", _recorded("parameters"), scaled, 0, ""),
        (
            "gflops_per_image",
            "GFLOPs per image",
            _recorded("gflops_per_image"),
            decimal,
            0,
            "forward and backward",
        ),
    ),
}


def _accuracy(runs: Sequence[Run]) -> list[Quantity]:
    lines = []
    for task in sorted({task for run in runs for task in run.evaluations}):
        final = [run.evaluations[task][-1] if task in run.evaluations else None for run in runs]
        names = dict.fromkeys(name for evaluation in final if evaluation for name in evaluation.metrics)
        for name in sorted(names, key=_metric_order):
            values = tuple(_metric(evaluation, name) for evaluation in final)
            score = is_share(name) and not is_chance(name)
            show = percent if is_share(name) else count if _COUNT.search(name) else decimal
            lines.append(Quantity(f"{task}/{name}", metric_label(name), task, values, show, int(score)))
        steps = tuple(None if evaluation is None else float(evaluation.step) for evaluation in final)
        lines.append(Quantity(f"{task}/step", "evaluated at step", task, steps, count))
    return lines


def _metric(evaluation: Evaluation | None, name: str) -> float | None:
    return None if evaluation is None else evaluation.metrics.get(name)


def _metric_order(name: str) -> tuple[int, str, int]:
    """The task's own scores, its subsets, chance, then counts; recall by direction and rank."""
    rank = int(m.group(1)) if (m := re.search(r"(\d+)$", name)) else 1000
    if _COUNT.search(name):
        return 3, name, 0
    if is_chance(name):
        return 2, name, 0
    if name in ("top1", "top5", "mean_per_class", "mean_average_precision"):
        return 0, "", rank
    return 1, re.sub(r"\d+$", "", name), rank
