"""Panels, tables and sentences from the records of runs (`clipq.report.figure` has the form)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paper.record import interval

Record = dict[str, Any]
Records = Mapping[str, Sequence[Record]]
"""Arm -> the records of its runs, in the order of seeds."""
POINTS = 120
"""Of a curve."""


def top1(record: Record) -> float:
    """Zero-shot accuracy in percent at the run's end, of the first task that has one; NaN where the run diverged."""
    found = [100 * task[-1]["top1"] for task in record["evaluations"].values() if "top1" in task[-1]]
    return found[0] if found and not record["diverged"] else math.nan


def chance(records: Records) -> float | None:
    """Accuracy in percent of a guess, where the evaluation says it."""
    found = [task[-1].get("chance") for runs in records.values() for r in runs for task in r["evaluations"].values()]
    return next((100 * value for value in found if value is not None), None)


def final_loss(record: Record) -> float:
    """Mean loss of the last twentieth of the steps, NaN where the run diverged."""
    tail = [v for v in record["loss"][-max(1, len(record["loss"]) // 20) :] if v is not None]
    return math.nan if record["diverged"] or not tail else sum(tail) / len(tail)


def mean(runs: Sequence[Record], value: Callable[[Record], float | None]) -> tuple[float, float | None]:
    """Mean over seeds and half-width of its 95 % interval; NaN where a run has no value, for the others would be a
    choice of the good ones."""
    values = [v for r in runs if (v := value(r)) is not None and math.isfinite(v)]
    return interval(values) if values and len(values) == len(runs) else (math.nan, None)


def difference(
    runs: Sequence[Record], base: Sequence[Record], value: Callable[[Record], float]
) -> tuple[float, float | None]:
    """Mean of what each run has more than the run of `base` with its seed, and the half-width of its 95 % interval; NaN
    where one has no value."""
    pairs = {r["seed"]: value(r) for r in base}
    deltas = [{"delta": value(r) - pairs[r["seed"]]} for r in runs]
    return mean(deltas, lambda r: r["delta"])


def seeds(runs: Sequence[Record]) -> str:
    """How many runs there are, and how many of them diverged."""
    diverged = sum(r["diverged"] is not None for r in runs)
    return f"{len(runs)}, {diverged} diverged" if diverged else str(len(runs))


def series(name: str, x: Sequence[float], values: Sequence[tuple[float, float | None]], form: str) -> dict[str, Any]:
    """Means with their intervals."""
    low, high = ([m + sign * (d or 0) for m, d in values] for sign in (-1, 1))
    lists = {"x": list(x), "y": [m for m, _ in values], "low": low, "high": high}
    return {"name": name, "form": form, **{key: [_finite(v) for v in own] for key, own in lists.items()}}


def panel(title: str, x: str | Sequence[str], y: str, own: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """`x` is a label, or the names of places; `log` names the axes that are logarithmic."""
    log = more.pop("log", "")
    axis: dict[str, Any] = {"label": x} if isinstance(x, str) else {"label": "", "ticks": list(x)}
    return {
        "title": title,
        "x": axis | {"log": "x" in log},
        "y": {"label": y, "log": "y" in log},
        "series": list(own),
    } | more


def level(y: float | None, label: str) -> list[dict[str, Any]]:
    return [] if y is None else [{"y": y, "label": label}]


def curve(name: str, runs: Sequence[Record], key: str = "loss") -> dict[str, Any]:
    """Mean over seeds of a value of each step, some steps together, as far as all seeds have one."""
    length = min(len(r[key] or ()) for r in runs)
    together = max(1, max(len(r[key] or ()) for r in runs) // POINTS)
    x, y = [], []
    for start in range(0, length, together):
        values = [v for r in runs for v in r[key][start : min(start + together, length)]]
        x.append(min(start + together, length))
        y.append(None if None in values else round(sum(values) / len(values), 5))
    return {"name": name, "form": "line", "x": x, "y": y}


def shown(value: tuple[float, float | None], digits: int = 2, sign: bool = False) -> str:
    """`12.30 ± 0.40`; a dash where there is none."""
    m, d = value
    if not math.isfinite(m):
        return "–"
    text = f"{m:+.{digits}f}" if sign else f"{m:.{digits}f}"
    return text + (f" ± {d:.{digits}f}" if d is not None else "")


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
