"""Figures of measured results from their JSON files: an image of the panels, and a page in Markdown.

A file holds everything that its image and page show:

    {"kind": "figure", "name": "fig1", "title": "…", "scale": "small", "command": "…", "environment": {…},
     "paper": "what the paper found", "here": ["what was found here", …], "differs": "where and why",
     "panels": [panel, …], "table": {"columns": ["…"], "rows": [["…"], …]}, …}

    panel: {"title": "…", "x": axis, "y": axis, "series": [series, …],
            "levels": [{"y": 0.02, "label": "chance"}], "events": [{"x": 2016, "label": "…"}]}
    axis: {"label": "step", "log": false, "ticks": ["names of the places 0, 1, … on it"]}
    series: {"name": "…", "form": "line", "x": […], "y": […], "low": […], "high": […]}

A form is line, points, line+points or bars. `levels`, `events`, `ticks`, `low` and `high` may be left out, and a
series may have numbers `color` and `dash` in place of its name's own. null in `y` is a value that is not there.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipq.report.plots import COLORS, DASHES, GREY, MARKERS, canvas, legend, log_y, png, style
from clipq.report.tables import markdown_row, markdown_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMS = ("line", "points", "line+points", "bars")
KEYS = {"name": str, "title": str, "scale": str, "command": str, "environment": dict, "paper": str, "here": list,
        "differs": str, "panels": list, "table": dict}  # fmt: skip
BAR = 0.8
"""Width of a group of bars; places of an axis lie 1 apart."""


class FigureError(ValueError):
    """A file is not a figure; the message says why."""


def read_figure(path: Path) -> dict[str, Any]:
    """The content of a figure's file, checked.

    Raises:
        FigureError: it cannot be read as one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FigureError(f"{path}: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != "figure":
        raise FigureError(f'{path} is no figure: expected {{"kind": "figure", …}}, as scripts/reproduce.py writes it')
    for key, kind in KEYS.items():
        if not isinstance(content.get(key), kind):
            raise FigureError(f"{path}: {key}: expected {'text' if kind is str else f'a JSON {kind.__name__}'}")
    if not content["panels"] or not all({"title", "x", "y", "series"} <= panel.keys() for panel in content["panels"]):
        raise FigureError(f"{path}: panels: expected at least one, each with title, x, y and series")
    for panel in content["panels"]:
        for series in panel["series"]:
            lengths = {len(series[key]) for key in ("x", "y", "low", "high") if key in series}
            if series.get("form") not in FORMS or len(lengths) != 1:
                raise FigureError(f"{path}: series {series['name']!r} of {panel['title']!r}: expected one of "
                                  f"{', '.join(FORMS)}, and as many values in each list")  # fmt: skip
    return content


def write_figure(path: Path, out: Path | None = None) -> Path:
    """Draws the figure of a JSON file: an image and a page of the same name in the folder `out`, or beside it.

    The image's bytes depend on the file and on the version of matplotlib only.

    Returns:
        The path of the page.

    Raises:
        FigureError: the file is no figure.
        OSError: the folder cannot be written.
    """
    content = read_figure(path)
    folder = path.parent if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{path.stem}.png").write_bytes(draw_figure(content))
    page = folder / f"{path.stem}.md"
    page.write_text(figure_page(content, f"{path.stem}.png"), encoding="utf-8")
    return page


def draw_figure(content: dict[str, Any]) -> bytes:
    """The panels, two beside each other, as a PNG."""
    panels = content["panels"]
    names = list(dict.fromkeys(series["name"] for panel in panels for series in panel["series"]))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with style():
        figure = canvas(0.6 + 0.22 * math.ceil(len(names) / 3) + 3.3 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        entries: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            _panel(axes, panel, names, entries)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        legend(figure, [(entries[name][0], name) for name in names if name in entries])
        return png(figure)


def _panel(axes: Axes, panel: dict[str, Any], names: list[str], entries: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    bars = [series["name"] for series in panel["series"] if series["form"] == "bars"]
    for series in panel["series"]:
        x, y = (np.asarray([math.nan if v is None else v for v in series[k]], float) for k in ("x", "y"))
        place = names.index(series["name"])
        color = COLORS[series.get("color", place) % len(COLORS)]
        if series["form"] == "bars":
            width = BAR / len(bars)
            x = x + (bars.index(series["name"]) - (len(bars) - 1) / 2) * width
            made = axes.bar(x, y, 0.92 * width, color=color, yerr=_error(series, y), ecolor="#333333", capsize=2)
        else:
            line = _line(series, place)
            made = axes.errorbar(x, y, yerr=_error(series, y), color=color, capsize=2, **line)
            if entries.get(series["name"], (made, color))[1] != color:
                made, color = Line2D([], [], color=GREY, **line), GREY  # a name that several colours share
                entries[series["name"]] = made, color
        entries.setdefault(series["name"], (made, color))
    _axes(axes, panel)
    for level in panel.get("levels", ()):
        axes.axhline(level["y"], color=GREY, linestyle=":", linewidth=1.4)
        _note(axes, level["label"], 0.995, level["y"], axes.get_yaxis_transform(), ha="right", va="bottom")
    for event in panel.get("events", ()):
        axes.axvline(event["x"], color=GREY, linestyle="--", linewidth=1)
        _note(axes, event["label"], event["x"], 0.01, axes.get_xaxis_transform(), ha="right", va="bottom", rotation=90)


def _line(series: dict[str, Any], place: int) -> dict[str, Any]:
    dash = DASHES[series.get("dash", place // len(COLORS)) % len(DASHES)]
    points = "points" in series["form"]
    return {
        "linestyle": dash if "line" in series["form"] else "none",
        "linewidth": 1.4,
        "marker": MARKERS[place % len(MARKERS)] if points else "none",
        "markersize": 4.5,
    }


def _error(series: dict[str, Any], y: np.ndarray) -> np.ndarray | None:
    if "low" not in series:
        return None
    low, high = (np.asarray([math.nan if v is None else v for v in series[k]], float) for k in ("low", "high"))
    error = np.nan_to_num(np.stack([y - low, high - y])).clip(min=0)  # a mean of one value is off by its last digit
    return error if error.any() else None  # a single run has no interval


def _axes(axes: Axes, panel: dict[str, Any]) -> None:
    x, y = panel["x"], panel["y"]
    axes.set_title(panel["title"], fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(x["label"])
    axes.set_ylabel(textwrap.fill(y["label"], 34))
    if "ticks" in x:
        slanted = {"rotation": 20, "ha": "right"} if sum(map(len, x["ticks"])) > 60 else {}
        axes.set_xticks(range(len(x["ticks"])), x["ticks"], fontsize=8, **slanted)
        axes.grid(False, axis="x")
    elif x.get("log"):
        axes.set_xscale("log")
    if y.get("log"):
        if any(series["form"] == "bars" for series in panel["series"]):
            axes.set_yscale("log")
        else:
            log_y(axes)


def _note(axes: Axes, text: str, x: float, y: float, transform: Any, **where: Any) -> None:
    axes.text(x, y, text, transform=transform, fontsize=7.5, color=GREY, parse_math=False, **where)


def figure_page(content: dict[str, Any], image: str) -> str:
    """The figure as a page: image, findings, table, and what it was made with."""
    environment = content["environment"]
    made = ", ".join(f"{key} {environment[key]}" for key in ("torch", "triton", "commit") if environment.get(key))
    return "\n".join(
        [
            f"# {content['title']}",
            "",
            f"![{content['title']}]({image})",
            "",
            f"**The paper.** {content['paper']}",
            "",
            "**Here.**",
            "",
            *(f"- {finding}" for finding in content["here"]),
            "",
            *([f"**Where they differ.** {content['differs']}", ""] if content["differs"] else []),
            markdown(content["table"]),
            "",
            f"Scale `{content['scale']}`, {environment.get('device')}, {made}.",
            "",
            "```",
            content["command"],
            "```",
            "",
        ]
    )


def markdown(table: dict[str, Any]) -> str:
    """A table in Markdown."""
    lines = [[markdown_text(str(cell)) for cell in line] for line in (table["columns"], *table["rows"])]
    lines.insert(1, ["---"] * len(table["columns"]))
    return "".join(markdown_row(line[0], line[1:]) for line in lines).rstrip("\n")
