"""Curves of runs as PNG images, drawn through matplotlib's objects: pyplot's global state stays untouched.

matplotlib is imported when the first image is drawn.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from clipq.report.runs import Run
from clipq.report.summary import chance_of, metric_label, primary_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), without its yellow, which is too pale for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#6b6b6b"
LOG_X_STEPS = 300
"""From this many steps on, loss by step has a logarithmic axis: most of the fall is early in a run."""
NOISY_POINTS = 20
"""A curve of fewer points than this is drawn as it is."""
MAX_POINTS = 4000
"""A longer curve is thinned to about this many points, keeping the extremes of each stretch."""

Values = Callable[[Run], np.ndarray]


@dataclass(frozen=True)
class Plot:
    """One image."""

    name: str
    """File name without its suffix."""
    title: str
    caption: str
    """How to read it."""
    png: bytes


@dataclass(frozen=True)
class _Row:
    """One quantity that is drawn by step and by wall time."""

    label: str
    values: Values
    log_y: bool = False
    from_zero: bool = False
    noisy: bool = False
    """Drawn as a mean over neighbours, with the values themselves pale behind it."""


@dataclass(frozen=True)
class _Clock:
    """Unit of the wall-time axis."""

    unit: str
    seconds: float


def color(index: int) -> str:
    """Colour of run `index`, the same in every plot and on the page."""
    return COLORS[index % len(COLORS)]


def draw(runs: Sequence[Run]) -> list[Plot]:
    """Every plot that the runs have data for: loss, accuracy by task, throughput, learning rate, stability.

    Each has a column by step and one by wall time, and every run on the same axes. The bytes depend on the
    runs and the version of matplotlib only, not on the user's matplotlib settings.
    """
    with style():
        plots = [_loss(runs)]
        tasks = sorted({task for run in runs for task in run.evaluations})
        used: set[str] = set()
        plots += [_accuracy(runs, task, _file_name(task, used)) for task in tasks]
        plots += [plot for plot in (_throughput(runs), _learning_rate(runs), _stability(runs)) if plot]
    return plots


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the finite values [n] at most `reach` places away, and at most a fifth of the way to the start.

    The window is centred, so the curve does not lag behind as an exponential average would; it grows with the
    step, so the steep beginning is not flattened and looks even on a logarithmic axis. A place whose window
    holds no finite value is NaN.
    """
    n = len(values)
    index = np.arange(n)
    near = np.minimum(index // 5, reach)
    low, high = index - near, np.minimum(index + near + 1, n)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (number[high] - number[low])


@contextmanager
def style() -> Iterator[None]:
    import matplotlib.style

    ours: dict[str, Any] = {
        "font.size": 10,
        "axes.edgecolor": "#9a9a9a",
        "axes.labelcolor": "#333333",
        "xtick.color": "#555555",
        "ytick.color": "#555555",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.7,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "agg.path.chunksize": 10000,
    }
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        # A run's name may hold letters that the font lacks: they show as boxes, no reason to alarm.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _loss(runs: Sequence[Run]) -> Plot:
    figure, grid, clock = _figure(runs, rows=1)
    for column, axes in enumerate(grid[0]):
        for index, run in enumerate(runs):
            _curve(axes, _x(run, column, clock), run.train["loss"], index, noisy=True)
        _mark_resumes(axes, runs, column, clock)
        axes.set_ylabel("contrastive loss (nats)")
        _limit_outliers(axes, [run.train["loss"] for run in runs])
    longest = max(run.last_step for run in runs)
    if longest >= LOG_X_STEPS:
        grid[0][0].set_xscale("log")
        grid[0][0].set_xlim(1, longest * 1.05)
        grid[0][0].set_xlabel("step (logarithmic)")
        grid[0][0].xaxis.set_major_formatter(_thousands)
    _legend(figure, runs, noisy=True)
    caption = "Mean over neighbouring steps; each step's own loss is drawn pale behind it."
    return Plot("loss", "Loss", caption, png(figure))


def _accuracy(runs: Sequence[Run], task: str, name: str) -> Plot:
    present = [(index, run, run.evaluations[task]) for index, run in enumerate(runs) if task in run.evaluations]
    seen = dict.fromkeys(m for _, _, evaluations in present for e in evaluations for m in e.metrics)
    metrics = primary_metrics(list(seen))
    figure, grid, clock = _figure(runs, rows=1)
    for column, axes in enumerate(grid[0]):
        for index, _, evaluations in present:
            x = [e.seconds / clock.seconds if column else float(e.step) for e in evaluations]
            for place, metric in enumerate(metrics):
                y = [100 * e.metrics.get(metric, math.nan) for e in evaluations]
                axes.plot(x, y, **_line(index), **_marker(place))
        for level in sorted({c for *_, es in present for e in es for m in metrics if (c := chance_of(m, e.metrics))}):
            axes.axhline(100 * level, color=GREY, linestyle=":", linewidth=1.4)
        _mark_resumes(axes, [run for _, run, _ in present], column, clock, indices=[i for i, *_ in present])
        axes.set_ylabel("recall at 1 (%)" if "image_to_text_r1" in metrics else "accuracy (%)")
        axes.set_xlim(left=0)
        axes.set_ylim(0, min(104.0, axes.get_ylim()[1] * 1.05))
    chance = any(chance_of(m, e.metrics) for *_, es in present for e in es for m in metrics)
    _legend(figure, runs, only=[i for i, *_ in present], metrics=metrics, chance=chance)
    caption = ", ".join(metric_label(metric) for metric in metrics)
    caption = caption[:1].upper() + caption[1:] + (". Dotted: chance." if chance else ".")
    return Plot(name, f"Accuracy: {task}", caption, png(figure))


def _throughput(runs: Sequence[Run]) -> Plot | None:
    rows = [
        _Row("images/s", lambda run: run.train["images_per_second"], from_zero=True, noisy=True),
        _Row("waiting for data\n(% of time)", lambda run: 100 * run.train["data_wait"], from_zero=True, noisy=True),
    ]
    caption = "Images trained on each second, and the share of the time that the device waited for the loader."
    return _rows(runs, "throughput", "Throughput", caption, rows)


def _learning_rate(runs: Sequence[Run]) -> Plot | None:
    rows = [_Row("learning rate", lambda run: run.train["lr"], from_zero=True)]
    return _rows(runs, "learning_rate", "Learning rate", "The rate that the schedule set at each step.", rows)


def _stability(runs: Sequence[Run]) -> Plot | None:
    rows = [
        _Row("gradient norm", lambda run: run.train["grad_norm"], log_y=True, noisy=True),
        _Row("logit scale", lambda run: run.train["logit_scale"]),
    ]
    caption = "Norm of the gradient before clipping, and the factor that similarities are multiplied by."
    return _rows(runs, "stability", "Stability", caption, rows)


def _rows(runs: Sequence[Run], name: str, title: str, caption: str, rows: Sequence[_Row]) -> Plot | None:
    """One line of panels for each quantity that some run has values of; None where no run has any."""
    rows = [row for row in rows if any(np.isfinite(row.values(run)).any() for run in runs)]
    if not rows:
        return None
    figure, grid, clock = _figure(runs, rows=len(rows))
    for row, panels in zip(rows, grid, strict=True):
        for column, axes in enumerate(panels):
            for index, run in enumerate(runs):
                y = row.values(run)
                # Some are written each log interval only: the line joins the steps that have a value.
                known = np.isfinite(y) & ((y > 0) if row.log_y else True)
                _curve(axes, _x(run, column, clock)[known], y[known], index, noisy=row.noisy)
            _mark_resumes(axes, runs, column, clock)
            axes.set_ylabel(row.label)
            if row.log_y:
                log_y(axes)
            else:
                axes.yaxis.set_major_formatter(_thousands)
            if row.from_zero:
                axes.set_ylim(0, max(1.04 * axes.get_ylim()[1], 1e-12))
            axes.set_xlim(left=0)
    for axes in (axes for panels in grid[:-1] for axes in panels):
        axes.set_xlabel("")
    _legend(figure, runs, noisy=any(row.noisy for row in rows))
    return Plot(name, title, caption, png(figure))


def canvas(height: float) -> Figure:
    """An empty figure, so many inches high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, height), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def step_axis(axes: Axes, *, ticks: int = 6) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(_thousands)
    axes.locator_params("x", integer=True, nbins=ticks)


def log_y(axes: Axes) -> None:
    """A logarithmic axis for what has been drawn, with labels that do not meet."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_thousands)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(_two_and_five if math.log10(high / low) < 1.5 else "")


def _figure(runs: Sequence[Run], *, rows: int) -> tuple[Figure, list[list[Axes]], _Clock]:
    figure = canvas(0.7 + 2.9 * rows)
    grid = figure.subplots(rows, 2, squeeze=False)
    longest = max((float(np.nanmax(s)) for run in runs if np.isfinite(s := run.train["seconds"]).any()), default=0.0)
    clock = _Clock("s", 1) if longest < 180 else _Clock("min", 60) if longest < 10800 else _Clock("h", 3600)
    for axes in grid[:, 0]:
        step_axis(axes)
    for axes in grid[:, 1]:
        axes.set_xlabel(f"wall time ({clock.unit})")
    return figure, [list(row) for row in grid], clock


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, index: int, *, noisy: bool) -> None:
    """One run's line: the values [n], or where they are many and noisy their mean over neighbours."""
    middle = smooth(y, _reach(y)) if noisy else y
    if noisy and len(y) >= NOISY_POINTS:
        axes.plot(*thin(x, y), color=color(index), alpha=0.22, linewidth=0.8, zorder=1.5)
    lone = {"marker": "o", "markersize": 4} if np.isfinite(middle).sum() == 1 else {}  # no line to be seen by
    axes.plot(*thin(x, middle), **_line(index), **lone)


def _thousands(value: float, _: object = None) -> str:
    return f"{value:,.10g}"


def _two_and_five(value: float, _: object = None) -> str:
    return _thousands(value) if f"{value:e}"[0] in "25" else ""


def _x(run: Run, column: int, clock: _Clock) -> np.ndarray:
    return run.train["seconds"] / clock.seconds if column else run.train["step"]


def _line(index: int) -> dict[str, Any]:
    return {"color": color(index), "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def _marker(place: int) -> dict[str, Any]:
    """The first metric of a task is filled and strong, the others hollow and lighter."""
    light = {"markerfacecolor": "white", "alpha": 0.75, "linewidth": 1.2} if place else {}
    return {"marker": MARKERS[place % len(MARKERS)], "markersize": 4.5, **light}


def _reach(values: np.ndarray) -> int:
    return len(values) // 60 if len(values) >= 60 else int(len(values) >= NOISY_POINTS)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """About `MAX_POINTS` points of a longer curve: the extremes of each stretch, so that spikes stay."""
    if len(y) <= MAX_POINTS:
        return x, y
    edges = np.unique(np.geomspace(1, len(y) + 1, MAX_POINTS // 4).astype(int) - 1)
    edges = np.union1d(edges, np.linspace(0, len(y), MAX_POINTS // 4).astype(int))
    keep = {0, len(y) - 1}
    for low, high in pairwise(edges):
        stretch = y[low:high]
        if np.isfinite(stretch).any():
            keep |= {int(low + np.nanargmin(stretch)), int(low + np.nanargmax(stretch))}
    chosen = np.asarray(sorted(keep))
    return x[chosen], y[chosen]


def _limit_outliers(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Single steps that rise far above the curve leave the picture at the top rather than flatten it."""
    top, highest = (
        max((float(y[np.isfinite(y)].max()) for y in each if np.isfinite(y).any()), default=0.0)
        for each in ([smooth(y, _reach(y)) for y in curves], curves)
    )
    if 0 < 2 * top < highest:
        axes.set_ylim(top=2 * top)


def _mark_resumes(
    axes: Axes, runs: Sequence[Run], column: int, clock: _Clock, indices: Sequence[int] | None = None
) -> None:
    for index, run in zip(indices or range(len(runs)), runs, strict=True):
        for step, seconds in run.resumes:
            x = seconds / clock.seconds if column else step
            if math.isfinite(x):
                axes.axvline(x, color=color(index), linewidth=0.9, alpha=0.45, linestyle=(0, (1, 2)))
                axes.plot([x], [0.0], "^", color=color(index), markersize=6, clip_on=False, zorder=5,
                          transform=axes.get_xaxis_transform())  # fmt: skip


def _legend(
    figure: Figure,
    runs: Sequence[Run],
    *,
    only: Sequence[int] | None = None,
    metrics: Sequence[str] = (),
    chance: bool = False,
    noisy: bool = False,
) -> None:
    from matplotlib.lines import Line2D

    shown = range(len(runs)) if only is None else only
    entries = [(Line2D([], [], **_line(index)), short(runs[index].name)) for index in shown]
    for place, metric in enumerate(metrics):
        entries.append((Line2D([], [], color=GREY, **_marker(place)), metric_label(metric)))
    if noisy and max(len(run.train["step"]) for run in runs) >= NOISY_POINTS:
        entries.append((Line2D([], [], color=GREY), "mean over neighbouring steps"))
        entries.append((Line2D([], [], color=GREY, alpha=0.4, linewidth=0.8), "single values"))
    if chance:
        entries.append((Line2D([], [], color=GREY, linestyle=":"), "chance"))
    if any(runs[index].resumes for index in shown):
        entries.append((Line2D([], [], color=GREY, linestyle="", marker="^", markersize=6), "resumed"))
    legend(figure, entries)


def legend(figure: Figure, entries: Sequence[tuple[Any, str]]) -> None:
    """Places (handle, label) above the panels, in as many columns as there is room for."""
    room, widths = 130, [len(label) + 7 for _, label in entries]  # in letters
    columns = len(entries) if sum(widths) <= room else max(1, room // max(widths))
    placeholders = ["run"] * len(entries)
    made = figure.legend([h for h, _ in entries], placeholders, loc="outside upper left", ncols=columns)
    # Set afterwards: matplotlib leaves out labels with a leading underscore and reads $ as a formula's start.
    for text, (_, label) in zip(made.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def short(name: str, length: int = 48) -> str:
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def _file_name(task: str, used: set[str]) -> str:
    """`accuracy_<task>` with letters, digits, - and _ only; a number is added where two tasks would meet."""
    base = "accuracy_" + ("".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in task)[:80])
    name, number = base, 2
    while name.lower() in used:
        name, number = f"{base}_{number}", number + 1
    used.add(name.lower())
    return name


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
