"""Sentences of what `paper.noise` has measured, made of its numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paper.noise_panels import Measured, inner_dimensions, mean, quotients, ranged, settings_of
from paper.rounding import KINDS

TOLERANCE = 0.1


def findings(real: list[Measured], gaussian: Measured, settings: dict[str, Any]) -> list[str]:
    """What a reader should know of the panels and the table, in the order of the argument."""
    sizes = gaussian["sizes"]
    of_what = (
        f"{len(real)} linear layers of the image tower, {settings['trained_steps']:,} steps trained, over "
        f"{settings['batches']:,} batches of {settings['pairs']} pairs (loss {settings['loss']:.2f}); "
        f"{settings['columns']}² pairs of columns, b = {sizes[0]:,} to {sizes[-1]:,}."
    )
    lines = [_line(real, "stochastic", len(sizes) - 1), _line(real, "nearest", paper_size(sizes))]
    return [of_what, _control(gaussian), *lines, *_departures(real), _beside(real), _gaussian_beside(gaussian)]


def _control(gaussian: Measured) -> str:
    """Over all disjoint stretches: with few of them, chance alone moves a mean square by some percent."""
    each = {
        rounding: [_fixed_ratio(gaussian, s) for s in settings_of([rounding])] for rounding in ("nearest", "stochastic")
    }
    parts = [f"{ranged(np.concatenate(r), '{:.3f}')} rounded {_adverb(name)}" for name, r in each.items()]
    return f"Gaussian data, over all kinds and b: measured / derived is {' and '.join(parts)}."


def _fixed_ratio(layer: Measured, setting: str) -> np.ndarray:
    kind = layer["kinds"][setting]
    return np.array(kind["fixed_measured"]) / np.array(kind["fixed_derived"])


def _adverb(rounding: str) -> str:
    return "to nearest" if rounding == "nearest" else "stochastically"


def paper_size(sizes: list[int]) -> int:
    """Which size is nearest to the rows of ViT-H on one GPU of the paper."""
    b = inner_dimensions()["ViT-H"][2]
    return min(range(len(sizes)), key=lambda n: abs(math.log(sizes[n] / b)))


def _line(real: list[Measured], rounding: str, n: int) -> str:
    """Whether real data keep to the line at a size, by the spread of layers."""
    parts = []
    for kind in KINDS:
        ratios = quotients(real, f"{kind}, {rounding}")[:, n]
        error = float(ratios.std(ddof=1) / math.sqrt(len(ratios))) if len(ratios) > 1 else math.inf
        near = abs(ratios.mean() - 1) < max(2 * error, TOLERANCE) and ratios.max() < 2
        verdict = "not as derived" if not near else "as derived" if error < TOLERANCE else "too few to tell"
        parts.append(
            f"{kind} {ratios.mean():.2f} ± {error:.2f} (layers {ratios.min():.2f}–{ratios.max():.2f}), {verdict}"
        )
    b = real[0]["sizes"][n]
    return f"Real data rounded {_adverb(rounding)}, measured / derived at b = {b:,}: {'; '.join(parts)}."


def _departures(real: list[Measured]) -> list[str]:
    """Why rounding to nearest leaves the line, for kinds and layers where it does by more than a factor of 2."""
    found = []
    for kind in KINDS:
        setting = f"{kind}, nearest"
        ratio, size = quotients(real, setting)[:, -1], quotients(real, setting, "squared")[:, -1]
        off = [n for n, r in enumerate(ratio) if not 0.5 < r < 2]
        if not off:
            continue
        lost = [layer["kinds"][setting]["lost"][0] for layer in real]
        found.append(
            f"{kind}, to nearest: {len(off)} of {len(real)} layers are off the line by more than a factor of 2 at b = "
            f"{real[0]['sizes'][-1]:,}: squared errors are {ranged(size)} of what s²/12 says, and the square of their "
            f"sum is {ranged(ratio / size)} times that of independent ones. {ranged(lost, '{:.0%}')} of the values of "
            "G become 0."
        )
    return found


def _beside(real: list[Measured]) -> str:
    """Errors of dW also as they would be on the derived line: what is left then of their excess is the scales'."""
    parts, n = [], paper_size(real[0]["sizes"])
    for kind in KINDS:
        each = [layer["kinds"][f"{kind}, nearest"] for layer in real]
        stochastic = [layer["kinds"][f"{kind}, stochastic"]["relative"][n] for layer in real]
        of_dw, drawn = (
            np.array([mean(v) for v in values]) for values in ([k["relative"][n] for k in each], stochastic)
        )
        derived = of_dw / np.sqrt(quotients(real, f"{kind}, nearest")[:, n])
        Y, dX = (np.mean([k[product] for k in each]) for product in ("output", "grad_input"))
        parts.append(
            f"{kind}: Y {Y:.2%}, dX {dX:.2%}, dW {of_dw.mean():.2%} (on the derived line {derived.mean():.2%}), "
            f"stochastic dW {drawn.mean():.2%}"
        )
    b = real[0]["sizes"][n]
    return f"Relative errors of the three products of the same layers, dW at b = {b:,}: {'; '.join(parts)}."


def _gaussian_beside(gaussian: Measured) -> str:
    """What the inner dimension alone does."""
    kind = gaussian["kinds"]["int8, a scale a column, nearest"]
    n, b = gaussian["shape"][1], gaussian["sizes"][-1]
    return (
        f"Of Gaussian data int8 with a scale a column gives Y (n = {n}) an error of {kind['output']:.2%} and dW "
        f"(b = {b:,}) one of {mean(kind['relative'][-1]):.2%}."
    )
