"""Draws the recorded benchmarks of docs/benchmarks/ into docs/images/.

plot_benchmarks.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results import FOLDER, ROOT, STEP_NAMES

COLOURS = {"bf16": "#7a7a7a", "quantize": "#e8a33d", "product": "#3b75af", "16-bit": "#8fb8de"}


def save(figure: Any, name: str) -> None:
    path = ROOT / "docs" / "images" / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    print(f"wrote {path.relative_to(ROOT)}")


def step(name: str, result: dict[str, Any]) -> None:
    """Images a second of each column, as a CUDA graph where measured."""
    columns = {k: c for k, c in result["results"]["columns"].items() if "error" not in c}
    batch = result["results"]["settings"]["batch"]
    rates = {k: 1e3 * batch / (c["graph_step_ms"] or c["step_ms"]) for k, c in columns.items()}
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(rates) + 1))
    bars = axes.barh(
        [STEP_NAMES.get(k, f"clipq, {k}") for k in rates],
        list(rates.values()),
        color=[COLOURS["product" if "switchback" in k else "bf16"] for k in rates],
    )
    axes.bar_label(bars, fmt="{:.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("images/s")
    axes.set_title(f"{result['title']}, {result['environment']['device']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, name)


def linear(name: str, result: dict[str, Any]) -> None:
    """Where the time of a linear layer goes, in bf16 and by the recipe (the paper's figure 3)."""
    layers = result["results"]["operations"]
    parts = {  # operation -> colour; those of bf16 first
        "bf16 output": "bf16",
        "bf16 input gradient": "bf16",
        "bf16 weight gradient": "16-bit",
        "bf16 bias gradient": "quantize",
        "quantize X": "quantize",
        "quantize W": "quantize",
        "output": "product",
        "quantize G and sum for the bias": "quantize",
        "input gradient": "product",
    }
    figure, axes = plt.subplots(figsize=(7, 4))
    labels: set[str] = set()
    for place, times in enumerate(layers.values()):
        for row, ours in ((place * 2.6, False), (place * 2.6 + 1, True)):
            start = 0.0
            for part, colour in parts.items():
                if part.startswith("bf16") == ours and part != "bf16 weight gradient":
                    continue
                width = times[part]
                meaning = {
                    "bf16": "bf16 product",
                    "16-bit": "16-bit weight gradient",
                    "quantize": "quantization, sums",
                    "product": "8-bit product",
                }[colour]
                axes.barh(
                    row,
                    width,
                    left=start,
                    color=COLOURS[colour],
                    edgecolor="white",
                    label=None if meaning in labels else meaning,
                )
                labels.add(meaning)
                start += width
    axes.set_yticks(
        [p * 2.6 + d for p in range(len(layers)) for d in (0, 1)],
        [f"{layer} {kind}" for layer in layers for kind in ("bf16", result["results"]["recipe"])],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, forward and backward")
    axes.set_title(
        f"One linear layer, {result['results']['tokens']:,} tokens, {result['environment']['device']}", fontsize=10
    )
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, name)


def recipes(name: str, result: dict[str, Any]) -> None:
    """Losses of the first seed by every recipe, a point for every ten steps; bf16 lies on top."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for recipe, found in sorted(result["results"].items(), key=lambda item: item[0] == "bf16"):
        losses = found["runs"][0]["losses"]
        style: dict[str, Any] = {"color": "black", "linewidth": 2} if recipe == "bf16" else {"linewidth": 1}
        axes.plot([10 * (n + 1) for n in range(len(losses))], losses, label=recipe, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("contrastive loss")
    axes.set_title(f"{result['title']}, {result['environment']['device']}", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, name)


def spike(name: str, result: dict[str, Any]) -> None:
    """Loss and RMS_t of the patch embedding around the change, of each optimizer's first seed."""
    found, shown = result["results"], slice(30, 140)
    steps = range(found["first"], found["first"] + 10**6)
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    for variant, runs in found["variants"].items():
        thick = 2.0 if variant.endswith("0.999") else 1.0
        for axes, values in ((above, runs[0]["loss"]), (below, runs[0]["rms"])):
            axes.plot(steps[shown], values[shown], label=variant, linewidth=thick)
    for axes in (above, below):
        axes.axvline(found["change"] + 1, color="#7a7a7a", linestyle="--", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    below.axhline(2.3, color="#7a7a7a", linestyle=":", linewidth=1)
    below.set_yscale("log")
    above.set_ylabel("contrastive loss")
    below.set_ylabel("RMS_t of the patch embedding")
    below.set_xlabel("step; dashed: the first pairs in colour")
    above.set_title(f"{result['title']}, {result['environment']['device']}", fontsize=10)
    above.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.06))
    save(figure, name)


def loader_workers(name: str, result: dict[str, Any]) -> None:
    """Samples a second against the number of loader processes."""
    found = result["results"]
    figure, axes = plt.subplots(figsize=(6, 4))
    for loader, title, colour in (("clipq", "clipq", "product"), ("openclip", "OpenCLIP", "bf16")):
        points = {int(n): c["samples_per_second"].get(loader) for n, c in found["workers"].items()}
        if None not in points.values():
            axes.plot(list(points), list(points.values()), marker="o", color=COLOURS[colour], label=title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("loader processes")
    axes.set_ylabel("samples/s")
    made = f", enlarged to {found['enlarge']} px" if found["enlarge"] else ""
    axes.set_title(f"{found['data']}{made} → {found['size']} px, {found['cores']} cores", fontsize=10)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, name)


DRAWINGS = {"step": step, "linear": linear, "recipes": recipes, "spike": spike, "loader_workers": loader_workers}
"""Kind of results -> what draws them."""


def main() -> None:
    for path in sorted(Path(FOLDER).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        draw = DRAWINGS.get(result["kind"])
        if draw is not None:
            draw(path.stem, result)


if __name__ == "__main__":
    main()
