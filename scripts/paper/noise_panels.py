"""Panels, a table and sentences of what `paper.noise` has measured. Numbers are those of its `measure`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import open_clip

from paper.rounding import KINDS

Measured = dict[str, Any]
MODELS = {"ViT-B": "ViT-B-16", "ViT-L": "ViT-L-14", "ViT-H": "ViT-H-14"}
IMAGES = 256
"""On each GPU of the paper."""
X = {"label": "inner dimension of dW = Gᵀ X: images × tokens", "log": True}
VARIANCE = {"label": "variance of the error over mean square of a term", "log": True}
ROUNDINGS = ("nearest", "stochastic")


def inner_dimensions() -> dict[str, tuple[int, int, int]]:
    """Model -> smallest and largest inner dimension of Y and dX, and that of dW at the paper's batch."""
    found = {}
    for model, name in MODELS.items():
        config: Any = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        ratio, tokens = vision.get("mlp_ratio", 4.0), (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        found[model] = (vision["width"], round(vision["width"] * ratio), IMAGES * tokens)
    return found


def events() -> list[dict[str, Any]]:
    """Inner dimensions of the paper's largest model."""
    smallest, largest, of_weights = inner_dimensions()["ViT-H"]
    named = {smallest: "ViT-H, Y and dX", largest: "", of_weights: "ViT-H, dW"}
    return [{"x": float(size), "label": label} for size, label in named.items()]


def mean(values: Iterable[float]) -> float:
    """Geometric: these are ratios and variances."""
    values = list(values)
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values and min(values) > 0 else 0.0


def spread(name: str, sizes: Sequence[int], values: Sequence[Sequence[float]], form: str) -> dict[str, Any]:
    """A series: for each size the mean of its values, and the lowest and the highest."""
    y, low, high = [mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]
    return {"name": name, "x": list(map(float, sizes)), "y": y, "low": low, "high": high, "form": form}


def pooled(layers: list[Measured], setting: str, what: str) -> list[list[float]]:
    """For each size the numbers of all stretches of all layers."""
    each = [layer["kinds"][setting][what] for layer in layers]
    return [[v for values in size for v in values] for size in zip(*each, strict=True)]


def quotients(layers: list[Measured], setting: str, over: str = "measured", under: str = "derived") -> np.ndarray:
    """[layers, sizes] of means over stretches."""
    each = [layer["kinds"][setting] for layer in layers]
    pairs = [zip(kind[over], kind[under], strict=True) for kind in each]
    return np.array([[sum(a) / sum(b) if sum(b) else 1.0 for a, b in sizes] for sizes in pairs])


def slopes(layers: list[Measured], values_of: Callable[[Measured], Sequence[float]]) -> list[float]:
    """Of log(values) against log(b), by least squares, for each layer."""
    sizes = np.log(layers[0]["sizes"])
    return [float(np.polyfit(sizes, np.log(values_of(layer)), 1)[0]) if len(sizes) > 1 else 0.0 for layer in layers]


def growths(layers: list[Measured], setting: str) -> tuple[list[float], list[float]]:
    """Slopes of the error's variance for each layer: with the scales of its own rows, and with those of all rows."""
    own = slopes(layers, lambda layer: [float(np.mean(v)) for v in layer["kinds"][setting]["measured"]])
    return own, slopes(layers, lambda layer: layer["kinds"][setting]["fixed_measured"])


def panels(real: list[Measured], gaussian: Measured) -> list[dict[str, Any]]:
    """To be drawn, a colour for each kind; bars reach from the lowest to the highest of all layers' stretches."""
    ratios = []
    for setting, look in _looks():
        values = quotients(real, setting).T.tolist()
        ratios.append(spread(look["name"], gaussian["sizes"], values, "line+points") | look)
    over = _panel("Real X and G: measured over derived", "measured over derived variance", ratios)
    over["levels"] = [{"y": 1.0, "label": "derived"}]
    found = [
        _variances("Gaussian data, rounded to nearest", [gaussian]),
        _variances("Real X and G, rounded to nearest", real),
        over,
        _relative(real, gaussian["sizes"]),
    ]
    for panel in found:
        panel["events"] = events()
    return found


def _looks() -> list[tuple[str, dict[str, Any]]]:
    """Settings, and how their series look: rounded to nearest under the name of the kind, else dashed."""
    return [
        (f"{kind}, {rounding}", {"color": n, "dash": dash, "name": kind if rounding == "nearest" else "stochastic"})
        for dash, rounding in enumerate(ROUNDINGS)
        for n, kind in enumerate(KINDS)
    ]


def settings_of(roundings: Sequence[str] = ROUNDINGS) -> list[str]:
    return [f"{kind}, {rounding}" for kind in KINDS for rounding in roundings]


def _panel(title: str, label: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    y = {"label": label, "log": True}
    return {"title": title, "x": X, "y": y, "series": series, "levels": [], "events": []}


def _variances(title: str, layers: list[Measured]) -> dict[str, Any]:
    series, sizes = [], layers[0]["sizes"]
    for n, kind in enumerate(KINDS):
        setting = f"{kind}, nearest"
        series.append(spread(kind, sizes, pooled(layers, setting, "measured"), "points") | {"color": n})
        derived = [mean(values) for values in pooled(layers, setting, "derived")]
        line = {"name": "derived", "x": series[-1]["x"], "y": derived, "form": "line"}
        series.append(line | {"color": n, "dash": 0})
    return {**_panel(title, "", series), "y": VARIANCE}


def _relative(real: list[Measured], sizes: list[int]) -> dict[str, Any]:
    """Relative errors of dW against b, and those of Y and dX of the same layers at their own inner dimensions."""
    series = [
        spread(look["name"], sizes, pooled(real, setting, "relative"), "line+points") | look
        for setting, look in _looks()
    ]
    for n, kind in enumerate(KINDS):
        for product, at, label in (("output", 1, "Y"), ("grad_input", 0, "dX")):
            points = sorted((float(r["shape"][at]), r["kinds"][f"{kind}, nearest"][product]) for r in real)
            x, y = (list(values) for values in zip(*points, strict=True))
            series.append({"name": label, "x": x, "y": y, "form": "points", "color": n})
    return _panel("Real X and G: relative error of dW, Y, dX", "root mean square of error over product", series)


def table(real: list[Measured], gaussian: Measured) -> dict[str, Any]:
    """A row for each data and setting; of real data the mean over layers and, in brackets, lowest and highest."""
    sizes = gaussian["sizes"]
    columns = ["data", "operands of dW", "rounded", f"measured / derived, b = {sizes[0]:,}", f"b = {sizes[-1]:,}"]
    columns += ["size", "correlation", "slope", "slope, scales fixed", "G lost", "X lost", "kept of dW"]
    columns.append(f"relative error, b = {sizes[-1]:,}")
    rows = []
    for data, layers in (("Gaussian", [gaussian]), ("real", real)):
        for setting in settings_of():
            kind, _, rounding = setting.rpartition(", ")
            ratio, size = quotients(layers, setting), quotients(layers, setting, "squared")
            own, fixed = growths(layers, setting)
            # what becomes 0 is known for rounding to nearest; by chance, some of any value does
            lost = [layer["kinds"][setting].get("lost") for layer in layers]
            shares = [ranged([v[n] for v in lost], "{:.1%}") if lost[0] else "–" for n in range(2)]
            last = [[np.mean(layer["kinds"][setting][k][-1]) for layer in layers] for k in ("kept", "relative")]
            numbers = [ratio[:, 0], ratio[:, -1], size[:, -1], ratio[:, -1] / size[:, -1]]
            texts = [*(ranged(n, "{:.3g}") for n in numbers), *(ranged(n, "{:.2f}") for n in (own, fixed))]
            rows.append([data, kind, rounding, *texts, *shares, ranged(last[0], "{:.3f}"), ranged(last[1], "{:.2%}")])
    return {"columns": columns, "rows": rows}


def ranged(values: Iterable[float], form: str = "{:.2f}") -> str:
    """Arithmetic mean and, of several values, the lowest and the highest."""
    values = [float(v) for v in values]
    text = form.format(sum(values) / len(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))}–{form.format(max(values))})"
