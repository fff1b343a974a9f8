"""Sentences of what `paper.noise` has measured, made of its numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paper.noise_panels import Measured, growths, inner_dimensions, mean, quotients, ranged, settings_of, signal_slopes
from paper.rounding import KINDS


def findings(real: list[Measured], gaussian: Measured, settings: dict[str, Any]) -> list[str]:
    """What a reader should know of the panels and the table, in the order of the argument."""
    sizes = gaussian["sizes"]
    of_what = (
        f"{len(real)} linear layers of the image tower, {settings['trained_steps']:,} steps trained, over "
        f"{settings['batches']:,} batches of {settings['pairs']} pairs (loss {settings['loss']:.2f}); "
        f"{settings['columns']}² pairs of columns, b = {sizes[0]:,} to {sizes[-1]:,}."
    )
    found = [of_what, _control(gaussian), _line(real, "stochastic", len(sizes) - 1)]
    found += [_line(real, "nearest", n) for n in sorted({paper_size(sizes), len(sizes) - 1})]
    found += _departures(real)
    found += [_growth(real, rounding) for rounding in ("nearest", "stochastic")]
    return [
        *found,
        _signal(real, gaussian),
        _relative_growth(real),
        _beside(real),
        _gaussian_beside(gaussian),
        _paper(),
    ]


def _control(gaussian: Measured) -> str:
    """Over all disjoint stretches: with few of them, chance alone moves a mean square by some percent."""
    each = {
        rounding: [_fixed_ratio(gaussian, s) for s in settings_of([rounding])] for rounding in ("nearest", "stochastic")
    }
    parts = [f"{ranged(np.concatenate(r), '{:.3f}')} rounded {_adverb(name)}" for name, r in each.items()]
    return f"Gaussian data keep to the line: measured / derived is {' and '.join(parts)}, over all kinds and b."


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
        holds = abs(ratios.mean() - 1) < max(2 * error, 0.1) and ratios.max() < 2
        verdict = "as derived" if holds else "not as derived"
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
        worst = max(off, key=lambda n: abs(math.log(ratio[n])))
        each = [layer["kinds"][setting] for layer in real]
        lost, of_dX = [k["lost"] for k in each], [k["lost_in_grad_input"] for k in each]
        missing = [k["of_lost"] / mean(k["measured"][-1]) for k in each]
        found.append(
            f"{kind}, to nearest: {len(off)} of {len(real)} layers are off the line by more than a factor of 2. "
            f"Squared errors are {ranged(size)} of what s²/12 says, and the square of their sum is "
            f"{ranged(ratio / size)} times that of independent ones. {ranged([v[0] for v in lost], '{:.0%}')} of the "
            f"values of G become 0, {ranged([v[1] for v in lost], '{:.1%}')} of X (with the scales of dX "
            f"{ranged(of_dX, '{:.1%}')} of G); what those of G would have added to dW has {ranged(missing)} of the "
            "mean square of the whole error (above 1 where other errors make up for some of it). Farthest: "
            f"{real[worst]['layer']}, {ratio[worst]:.2f} = {size[worst]:.2f} × {ratio[worst] / size[worst]:.2f}, "
            f"{lost[worst][0]:.0%} of G lost."
        )
    return found


def _growth(real: list[Measured], rounding: str) -> str:
    """Slopes, and what share of the growth is that of absmax scales."""
    parts = []
    for kind in KINDS:
        own, fixed = growths(real, f"{kind}, {rounding}")
        share = 1 - float(np.mean(fixed)) / float(np.mean(own)) if np.mean(own) else 0.0
        grows = f"{share:.0%} of the growth is that of the scales" if share > 0.01 else "scales add nothing to it"
        parts.append(f"{kind} as b^{np.mean(own):.2f}, with fixed scales as b^{ranged(fixed)}: {grows}")
    return f"Rounded {_adverb(rounding)}, the variance grows: {'; '.join(parts)}. Derived is b^1 with fixed scales."


def _signal(real: list[Measured], gaussian: Measured) -> str:
    b, last = real[0]["sizes"][-1], [layer["signal"][-1] for layer in real]
    return (
        f"dW itself grows as b^{ranged(signal_slopes(real))} (√b would be a random walk, b a signal that all rows "
        f"share; Gaussian data b^{ranged(signal_slopes([gaussian]))}). At b = {b:,} its mean square is {ranged(last)} "
        "times that of a random walk of the same terms."
    )


def _relative_growth(real: list[Measured]) -> str:
    sizes, parts = real[0]["sizes"], []
    for setting in settings_of():
        first, last = ([mean(layer["kinds"][setting]["relative"][n]) for layer in real] for n in (0, -1))
        parts.append(f"{setting}: {np.mean(first):.2%} to {ranged(last, '{:.2%}')}")
    return f"Relative error of dW from b = {sizes[0]:,} to {sizes[-1]:,}: {'; '.join(parts)}."


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
        f"(b = {b:,}) one of {mean(kind['relative'][-1]):.2%}: variance and product grow alike, and what the inner "
        "dimension adds to the relative error is the growth of the largest magnitude alone."
    )


def _paper() -> str:
    sizes = inner_dimensions()
    smallest, largest, b = sizes["ViT-H"]
    return (
        f"In ViT-H at {b:,} rows a sum of dW is {b / largest:.0f} to {b / smallest:.0f} times as long as those of Y "
        f"and dX, in ViT-B at {sizes['ViT-B'][2]:,} rows {sizes['ViT-B'][2] / sizes['ViT-B'][1]:.0f} to "
        f"{sizes['ViT-B'][2] / sizes['ViT-B'][0]:.0f} times."
    )
