"""What is kept of a finished run, and statistics over seeds."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipq.report.runs import RunError, read_run
from clipq.report.stability import PATCH_EMBEDDING, analyse
from clipq.watch.spikes import Rules

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20}
"""Student's t for a two-sided 95 % interval of the mean of so many values."""
DIGITS = 5


def summary(folder: Path, *, diverged: bool = False) -> dict[str, Any]:
    """The curves and results of a run folder as plain values, and the spikes that the rules find in it.

    Args:
        diverged: the run has failed; it counts as diverged if the guard has refused steps.

    Raises:
        RunError: no step was made.
    """
    run = read_run(folder)
    found = analyse(run)
    features = _features(folder / "metrics.jsonl")
    bad = [event for event in run.events if event.name == "bad step"]
    rms = run.rms.get(PATCH_EMBEDDING)
    steady = run.train["images_per_second"][len(run.train["step"]) // 4 :]
    return {
        "environment": run.environment,
        "steps": run.last_step,
        "counted": found.steps,
        "seconds": float(run.train["seconds"][-1]),
        "images_per_second": float(np.nanmedian(steady)) if np.isfinite(steady).any() else None,
        "loss": _plain(run.train["loss"]),
        "rms": None if rms is None else _plain(rms),
        "features": {"first": features[0], "last": features[-1]} if features else {},
        "evaluations": {
            task: [{"step": e.step, "seconds": e.seconds, **e.metrics} for e in several]
            for task, several in run.evaluations.items()
        },
        "spikes": [{"step": s.step, "loss": s.loss, "mean": s.mean, "leads": s.leads} for s in found.spikes],
        "chance": None if rms is None else chance_of_a_lead(run.train["step"], run.train["loss"], rms, found.rules),
        "diverged": {"step": bad[0].step, "why": bad[0].text} if diverged and bad else None,
    }


def chance_of_a_lead(steps: np.ndarray, loss: np.ndarray, rms: np.ndarray, rules: Rules) -> float:
    """Share of the steps that count which lie close enough behind a high RMS_t of one parameter: so many spikes would
    follow one by chance."""
    counts = (steps > rules.ignore) & np.isfinite(loss)
    high = set(steps[counts & (rms >= rules.rms)].astype(int).tolist())
    behind = [any(int(step) - lead in high for lead in range(1, rules.lead + 1)) for step in steps[counts]]
    return sum(behind) / len(behind) if behind else 0.0


def last_step(folder: Path) -> int:
    """The last step of a run folder, 0 where there is none."""
    try:
        return read_run(folder).last_step
    except RunError:
        return 0


def _features(path: Path) -> list[dict[str, Any]]:
    """Mean magnitude of each block's output, of each step at which they were read."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # what a kill cut
            row = json.loads(line)
            if row["kind"] == "train" and row.get("features"):
                found.append({"step": row["step"], "magnitudes": row["features"]})
    return found


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % interval; one value has none."""
    if len(values) < 2:
        return values[0], None
    t = T95.get(len(values), 1.96 + 2.6 / len(values))
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def made_on(found: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What runs ran on, by their environments: several commits or devices are all named."""
    keys = ("device", "torch", "triton", "commit")
    return {key: ", ".join(sorted({str(facts.get(key)) for facts in found})) for key in keys}
