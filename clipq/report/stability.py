"""Loss spikes of a run, and what announced them: counts, and loss and RMS_t on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clipq.report.plots import COLORS, GREY, Plot, canvas, legend, log_y, png, short, step_axis, style, thin
from clipq.report.runs import Run
from clipq.report.summary import percent
from clipq.watch.spikes import LossSpike, RmsEvent, Rules, SpikeDetector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

PATCH_EMBEDDING, PATCH_EMBEDDING_OF_TIMM = "visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"
CURVES = 5
"""Parameters whose RMS_t is drawn."""
TOLD = 5
"""Parameters that the sentence names."""
TOLD_LEADS = 10
"""Lead times of each that it gives."""
SPIKE = "#b00020"
MARKS = {"bad step": "x", "rewind": "<", "gradient overflow": "+", "failed save": "v", "failed upload": "1"}


@dataclass(frozen=True)
class Stability:
    """What the rules of `clipq.watch.spikes` find in the curve that a run continued."""

    rules: Rules
    rises: tuple[RmsEvent, ...]
    spikes: tuple[LossSpike, ...]
    steps: int
    """Steps that count: behind those left out, with a finite loss."""
    watched: float
    """Share of them at which RMS_t was read."""
    chance: float
    """Share of them that lie close enough behind a high RMS_t of any parameter to count as announced."""

    @property
    def announced(self) -> tuple[LossSpike, ...]:
        return tuple(spike for spike in self.spikes if spike.leads)

    def leads(self) -> dict[str, list[int]]:
        """Of each parameter that announced a spike, in the order of the spikes."""
        leads: dict[str, list[int]] = {}
        for spike in self.spikes:
            for name, lead in spike.leads.items():
                leads.setdefault(name, []).append(lead)
        return leads

    def text(self) -> str:
        """The findings in a sentence or two."""
        if self.steps <= 0:
            return (
                f"No step counts yet: the first {self.rules.ignore:,} (watch.ignore) and infinite losses are left out."
            )
        parts = [_count(len(self.spikes), "loss spike").capitalize() + f" in {self.steps:,} steps"]
        if self.spikes and self.watched:
            parts.append(f"; {len(self.announced)} announced by a high RMS_t 1 to {self.rules.lead} steps before")
            by = sorted(self.leads().items(), key=lambda item: -len(item[1]))
            told = [f"{len(leads)} by {name} (leads {_some(sorted(leads), TOLD_LEADS)})" for name, leads in by]
            parts.append(f": {_some(told, TOLD)}" if told else "")
            parts.append(f". By chance it would be {percent(self.chance)} of them")
        if self.rises:
            parts.append(f". {_count(len(self.rises), 'rise')} of RMS_t to {self.rules.rms} or more")
        if 0 < self.watched < 0.99:
            parts.append(
                f". RMS_t is known at {percent(self.watched)} of the steps, too few to count lead times: "
                "watch.every=1 reads it at each"
            )
        return "".join(parts) + "."


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}" + ("" if number == 1 else "s")


def _some(values: Sequence[object], most: int) -> str:
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most:,} more" if len(values) > most else "")


def analyse(run: Run) -> Stability:
    watch = run.config.get("watch")
    ignore = watch.get("ignore") if isinstance(watch, dict) else None
    rules = Rules(ignore=ignore) if isinstance(ignore, int) else Rules()
    detector = SpikeDetector(rules)
    found: list[RmsEvent | LossSpike] = []
    steps, loss = run.train["step"].astype(int), run.train["loss"]
    high = np.zeros(len(steps), bool)
    for i, (step, value) in enumerate(zip(steps.tolist(), loss.tolist(), strict=True)):
        rms = {name: float(values[i]) for name, values in run.rms.items() if np.isfinite(values[i])}
        found += detector.update(step, value, rms)
        high[i] = any(v >= rules.rms for v in rms.values())
    counts = (steps > rules.ignore) & np.isfinite(loss)
    rises = steps[high & counts]
    before = np.searchsorted(rises, steps)  # so many high steps lie before each
    behind = before > np.searchsorted(rises, steps - rules.lead)  # and some of them close enough
    known = np.zeros(len(steps), bool)
    for values in run.rms.values():
        known |= np.isfinite(values)
    return Stability(
        rules=rules,
        rises=tuple(e for e in found if isinstance(e, RmsEvent)),
        spikes=tuple(e for e in found if isinstance(e, LossSpike)),
        steps=int(counts.sum()),
        watched=float(known[counts].mean()) if counts.any() else 0.0,
        chance=float(behind[counts].mean()) if counts.any() else 0.0,
    )


def drawn(run: Run, found: Stability) -> list[str]:
    """The parameters whose RMS_t is drawn: the patch embedding, and those that rose highest where steps count."""
    highest = {name: _highest(run, found, values) for name, values in run.rms.items() if np.isfinite(values).any()}
    first = [n for n in (PATCH_EMBEDDING, PATCH_EMBEDDING_OF_TIMM) if n in highest]
    others = sorted((n for n in highest if n not in first), key=lambda n: -highest[n])
    return first + others[: CURVES - len(first)]


def _highest(run: Run, found: Stability, values: np.ndarray) -> float:
    # The first steps, where RMS_t of most parameters is large, would choose for a whole run.
    counted = values[(run.train["step"] > found.rules.ignore) | (found.steps == 0)]
    return float(np.nanmax(counted)) if np.isfinite(counted).any() else 0.0


def draw_stability(run: Run, found: Stability, *, name: str, title: str) -> Plot | None:
    """Loss above, RMS_t below; None where no RMS_t was read."""
    names = drawn(run, found)
    if not names:
        return None
    with style():
        figure = canvas(6.2)
        above, below = figure.subplots(2, 1, sharex=True)
        steps = run.train["step"]
        above.plot(*thin(steps, run.train["loss"]), color=COLORS[0], linewidth=0.9)
        above.set_ylabel("loss")
        entries = [(_rms(below, steps, run.rms[n], _color(i)), short(n)) for i, n in enumerate(names)]
        below.axhline(found.rules.rms, color=GREY, linestyle=":", linewidth=1.4)
        log_y(below)
        below.set_ylabel("RMS_t")
        step_axis(below, ticks=10)
        for axes in (above, below):
            axes.axvspan(0, min(found.rules.ignore, run.last_step), color=GREY, alpha=0.08, linewidth=0)
            axes.set_xlim(0, 1.01 * run.last_step)
        entries += _mark_spikes(above, below, found) + _mark_rises(below, found, names) + _mark_events(above, run)
        legend(figure, entries)
        image = png(figure)
    unseen = len(run.rms) - len(names)
    caption = f"Dotted: RMS_t of {found.rules.rms}, from which on it is an event. " + (
        f"The grey part, up to step {found.rules.ignore:,}, does not count." if found.rules.ignore > 0 else ""
    )
    caption += f" Of {unseen + len(names)} parameters that were watched {len(names)} are drawn." if unseen else ""
    return Plot(name, title, caption.strip(), image)


def _color(index: int) -> str:
    return COLORS[(index + 1) % len(COLORS)]  # the first is that of the loss


def _rms(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> Line2D:
    known = np.isfinite(values)
    lone = "o" if known.sum() == 1 else ""  # no line to be seen by
    (line,) = axes.plot(*thin(steps[known], values[known]), color=color, linewidth=0.9, marker=lone, markersize=4)
    return line


def _mark_spikes(above: Axes, below: Axes, found: Stability) -> list[tuple[Line2D, str]]:
    """Behind the curves: what rises just before a spike is to be seen."""
    marks = [
        axes.axvline(spike.step, color=SPIKE, linewidth=0.9, linestyle="--", zorder=1.2)
        for spike in found.spikes
        for axes in (above, below)
    ]
    return [(marks[0], "loss spike")] if marks else []


def _mark_rises(below: Axes, found: Stability, names: Sequence[str]) -> list[tuple[Line2D, str]]:
    marks: list[Line2D] = []
    for index, name in enumerate(names):
        rises = [(rise.step, rise.rms) for rise in found.rises if rise.parameter == name]
        if rises:
            marks += below.plot(*zip(*rises, strict=True), "v", color=_color(index), markersize=5)
    # The legend's triangle is grey: it stands for those of all colours.
    return [(_sign(below, "v"), "RMS_t event")] if marks else []


def _mark_events(above: Axes, run: Run) -> list[tuple[Line2D, str]]:
    """Near the upper edge; those beyond the curve, which a rewind gave up, are in the table only."""
    entries: list[tuple[Line2D, str]] = []
    for place, (name, marker) in enumerate(MARKS.items()):
        height = 1 - 0.08 * place  # a bad step and its rewind have the same step
        steps = [event.step for event in run.events if event.name == name and 0 <= event.step <= run.last_step]
        if steps:
            above.plot(steps, [height] * len(steps), marker, color="black", markersize=7, clip_on=False, zorder=5,
                       transform=above.get_xaxis_transform())  # fmt: skip
            entries.append((_sign(above, marker, "black"), name))
    return entries


def _sign(axes: Axes, marker: str, color: str = GREY) -> Line2D:
    """For the legend: a marker that is drawn nowhere else."""
    (line,) = axes.plot([], [], marker, color=color, markersize=6)
    return line


def lines(run: Run, found: Stability) -> list[tuple[int, str, str]]:
    """(step, kind, text) of everything that happened, in the order of steps."""
    rows = [(e.step, e.name, e.text) for e in run.events]
    for spike in found.spikes:
        leads = ", ".join(f"{name} {lead} steps before" for name, lead in spike.leads.items())
        told = f"loss {spike.loss:.3f}, running mean {spike.mean:.3f}" + (f"; RMS_t high in {leads}" if leads else "")
        rows.append((spike.step, spike.name, told))
    rows += [(e.step, e.name, f"RMS_t of {e.parameter}: {e.rms:.1f}") for e in found.rises]
    return sorted(rows, key=lambda row: row[0])


@dataclass(frozen=True)
class Part:
    """What the page says of the stability of one run."""

    run: Run
    text: str
    plot: Plot | None
    lines: list[tuple[int, str, str]]


def parts(runs: Sequence[Run]) -> list[Part]:
    """One for each run that watched RMS_t, to which something happened or whose loss has spikes."""
    found = []
    for index, run in enumerate(runs):
        stability = analyse(run)
        if not (run.rms or run.events or stability.spikes):
            continue
        name, title = ("rms", "") if len(runs) == 1 else (f"rms_{index + 1}", f": {run.name}")
        plot = draw_stability(run, stability, name=name, title=f"Loss and RMS_t{title}")
        found.append(Part(run, stability.text(), plot, lines(run, stability)))
    return found
