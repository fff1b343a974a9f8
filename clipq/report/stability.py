"""Loss spikes of a run, and what announced them: counts, and loss and RMS_t on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clipq.report.plots import COLORS, GREY, Plot, png, short, style, thin
from clipq.report.runs import Run
from clipq.report.summary import percent
from clipq.watch.spikes import LossSpike, RmsEvent, Rules, SpikeDetector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATCH_EMBEDDING = "visual.conv1.weight"
CURVES = 5
"""Parameters whose RMS_t is drawn."""


@dataclass(frozen=True)
class Stability:
    """What the rules of `clipq.watch.spikes` find in the curve that a run continued."""

    rules: Rules
    rises: tuple[RmsEvent, ...]
    spikes: tuple[LossSpike, ...]
    steps: int
    """Steps that count."""
    watched: float
    """Share of them at which RMS_t was read."""
    chance: float
    """Share of them that lie close enough behind a high RMS_t of any parameter to count as announced."""

    @property
    def announced(self) -> tuple[LossSpike, ...]:
        return tuple(spike for spike in self.spikes if spike.leads)

    def text(self) -> str:
        """The findings in a sentence or two."""
        if self.steps <= 0:
            return f"No step counts yet: the first {self.rules.ignore:,} are left out (watch.ignore)."
        parts = [_count(len(self.spikes), "loss spike") + f" in {self.steps:,} steps"]
        if self.spikes and self.watched:
            parts.append(f"; {len(self.announced)} announced by a high RMS_t 1 to {self.rules.lead} steps before")
            leads: dict[str, list[int]] = {}
            for spike in self.announced:
                for name, lead in spike.leads.items():
                    leads.setdefault(name, []).append(lead)
            told = [f"{name}: {', '.join(map(str, sorted(found)))} steps" for name, found in leads.items()]
            parts.append(f" ({'; '.join(told)})" if told else "")
            parts.append(f". By chance it would be {percent(self.chance)} of them")
        if self.rises:
            parts.append(f". RMS_t rose to {self.rules.rms} {_count(len(self.rises), 'time')}")
        if 0 < self.watched < 0.99:
            parts.append(
                f". RMS_t is known at {percent(self.watched)} of the steps, too few to count lead times: "
                "watch.every=1 reads it at each"
            )
        return "".join(parts) + "."


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}" + ("" if number == 1 else "s")


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
    counts = steps > rules.ignore
    behind = np.zeros(len(steps), bool)
    for step in steps[high & counts].tolist():
        behind |= (steps > step) & (steps <= step + rules.lead)
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


def drawn(run: Run) -> list[str]:
    """The parameters whose RMS_t is drawn: the patch embedding, and those that rose highest."""
    highest = {name: np.nanmax(v) for name, v in run.rms.items() if np.isfinite(v).any()}
    others = sorted((n for n in highest if n != PATCH_EMBEDDING), key=lambda n: -highest[n])
    return ([PATCH_EMBEDDING] if PATCH_EMBEDDING in highest else []) + others[: CURVES - (PATCH_EMBEDDING in highest)]


def draw_stability(run: Run, found: Stability, *, name: str) -> Plot | None:
    """Loss above, RMS_t below; None where no RMS_t was read."""
    names = drawn(run)
    if not names:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(10.5, 5.2), dpi=144, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        steps = run.train["step"]
        above.plot(*thin(steps, run.train["loss"]), color=COLORS[0], linewidth=0.9)
        above.set_ylabel("loss")
        for index, parameter in enumerate(names):
            values = run.rms[parameter]
            known = np.isfinite(values)
            color = COLORS[(index + 1) % len(COLORS)]
            below.plot(*thin(steps[known], values[known]), color=color, linewidth=0.9)
        below.axhline(found.rules.rms, color=GREY, linestyle=":", linewidth=1)
        below.set_yscale("log")
        for axis_format in (below.yaxis.set_major_formatter, below.yaxis.set_minor_formatter):
            axis_format(lambda value, _: f"{value:g}")
        below.set_ylabel("RMS$_t$")
        below.set_xlabel("step")
        _mark(above, below, found, names)
        legend = figure.legend(below.get_lines()[: len(names)], ["-"] * len(names), loc="outside upper left", ncols=2)
        for text, parameter in zip(legend.get_texts(), names, strict=True):  # matplotlib would read $ and _ in them
            text.set_parse_math(False)
            text.set_text(short(parameter))
        image = png(figure)
    caption = (
        f"Dotted: RMS_t of {found.rules.rms}, from which on it is an event (triangles). Loss spikes are red lines. "
        f"The grey part, up to step {found.rules.ignore:,}, does not count."
    )
    return Plot(name, "Loss and RMS_t", caption, image)


def _mark(above: Axes, below: Axes, found: Stability, names: Sequence[str]) -> None:
    for axes in (above, below):
        last = axes.get_xlim()[1]
        axes.axvspan(0, min(found.rules.ignore, last), color=GREY, alpha=0.08, linewidth=0)
        axes.set_xlim(0, last)
        for spike in found.spikes:
            axes.axvline(spike.step, color="#b00020", linewidth=0.8, alpha=0.7)
    for rise in found.rises:
        if rise.parameter in names:
            color = COLORS[(names.index(rise.parameter) + 1) % len(COLORS)]
            below.plot([rise.step], [rise.rms], marker="v", color=color, markersize=5, linestyle="none")


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
    """One for each run that watched RMS_t, or to which something happened."""
    found = []
    for index, run in enumerate(runs):
        if not run.rms and not run.events:
            continue
        stability = analyse(run)
        plot = draw_stability(run, stability, name="rms" if len(runs) == 1 else f"rms_{index + 1}")
        found.append(Part(run, stability.text(), plot, lines(run, stability)))
    return found
