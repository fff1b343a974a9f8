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

from clipq.report.runs import read_run
from clipq.report.stability import PATCH_EMBEDDING, analyse

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20}
"""Student's t for a two-sided 95 % interval of the mean of so many values."""
DIGITS = 5


def summary(folder: Path) -> dict[str, Any]:
    """The curves and results of a run folder as plain values, and the spikes that the rules find in it."""
    run = read_run(folder)
    found = analyse(run)
    features = _features(folder / "metrics.jsonl")
    bad = [event.step for event in run.events if event.name == "bad step"]
    rms = run.rms.get(PATCH_EMBEDDING)
    steady = run.train["images_per_second"][len(run.train["step"]) // 4 :]
    return {
        "environment": run.environment,
        "steps": run.last_step,
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
        "rises": [{"step": r.step, "parameter": r.parameter, "rms": r.rms} for r in found.rises],
        "chance": found.chance,
        "diverged": bad[-1] if bad and run.last_step < run.config["steps"] else None,
    }


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
