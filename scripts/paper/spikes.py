"""Figures of stability: how often losses spike, what announces a spike, and which optimizer has none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clipq.report.stability import PATCH_EMBEDDING
from clipq.watch.spikes import Rules
from paper.grid import Grid
from paper.panels import Record, Records, chance, level, mean, panel, seeds, series, shown, top1
from paper.precision import SEEDS, SIZES

Axes = Mapping[str, Sequence[tuple[str, Sequence[str]]]]
MI = SIZES["small"]["Mi"]
REFERENCE: Mapping[str, Sequence[str]] = {"paper": [], "small": MI, "tiny": []}
"""Overrides of the run that all axes share."""
AXES: Mapping[str, Axes] = {
    # axis -> (place on it, overrides)
    "paper": {
        "model": [("Base", ["model=vit_b_16"]), ("Large", ["model=vit_l_14"]), ("Huge", [])],
        "batch": [("4096", ["batch_size=4096"]), ("8192", ["batch_size=8192"]), ("16384", [])],
        "learning rate": [("5e-4", ["optim.lr=5e-4"]), ("1e-3", ["optim.lr=1e-3"]), ("2e-3", [])],
    },
    "small": {
        "model": [("Mi", MI), ("S", SIZES["small"]["S"]), ("B", SIZES["small"]["B"])],
        "batch": [("256", [*MI, "batch_size=256"]), ("1024", MI), ("4096", [*MI, "batch_size=4096"])],
        "learning rate": [("5e-4", [*MI, "optim.lr=5e-4"]), ("1e-3", MI), ("4e-3", [*MI, "optim.lr=4e-3"])],
    },
    "tiny": {"learning rate": [("1e-3", []), ("1e-2", ["optim.lr=1e-2"])]},
}
BETA2 = {"paper": (0.999, 0.98, 0.95), "small": (0.999, 0.95), "tiny": (0.999,)}


def _arm(scale: str, axis: str, place: str, overrides: Sequence[str], beta2: float) -> str:
    return f"{'reference' if overrides == REFERENCE[scale] else f'{axis} {place}'}, β2 {beta2}"


def _frequency_arms(scale: str) -> dict[str, list[str]]:
    return {
        _arm(scale, axis, place, overrides, beta2): [*overrides, f"optim.beta2={beta2}"]
        for beta2 in BETA2[scale]
        for axis, places in AXES[scale].items()
        for place, overrides in places
    }


FREQUENCY = Grid(experiment="fig6_spikes", arms={scale: _frequency_arms(scale) for scale in AXES}, seeds=SEEDS)

OPTIMIZERS = {
    "AdamW": ["optim=adamw"],
    "AdamW, norm clipped at 1": ["optim=adamw", "optim.clip_norm=1"],
    "StableAdamW": ["optim=stable_adamw"],
}
BETAS = {"paper": (0.9, 0.95, 0.98, 0.99, 0.999), "small": (0.9, 0.95, 0.99, 0.999), "tiny": (0.95, 0.999)}
PROVOKED = {"small": "provoked"}
OPTIMIZER = Grid(
    experiment="fig8_optimizers",
    arms={
        scale: {f"{o}, β2 {b}": [*own, f"optim.beta2={b}"] for o, own in OPTIMIZERS.items() for b in betas}
        for scale, betas in BETAS.items()
    },
    seeds=SEEDS,
    scales=PROVOKED,
)
WATCHED = "AdamW, β2 0.999"
LEAD = Grid(
    experiment="fig8_optimizers",
    arms={scale: {WATCHED: arms[WATCHED]} for scale, arms in OPTIMIZER.arms.items()},
    seeds={"paper": 1, "small": 10, "tiny": 2},
    scales=PROVOKED,
)


def _per_thousand(record: Record) -> float:
    return 1e3 * len(record["spikes"]) / record["counted"] if record["counted"] and not record["diverged"] else math.nan


def frequency(records: Records) -> dict[str, Any]:
    """Figure 6: loss spikes in a thousand steps against model size, batch size and learning rate, for each β2."""
    scale = next(s for s in AXES if set(_frequency_arms(s)) == set(records))
    panels, rows = [], []
    for axis, places in AXES[scale].items():
        own = []
        for beta2 in BETA2[scale]:
            arms = [_arm(scale, axis, place, overrides, beta2) for place, overrides in places]
            values = [mean(records[arm], _per_thousand) for arm in arms]
            own.append(series(f"β2 {beta2}", range(len(places)), values, "line+points"))
        panels.append(panel(axis, [place for place, _ in places], "loss spikes in 1,000 steps", own))
    for arm, runs in records.items():
        count = sum(len(r["spikes"]) for r in runs)
        rows.append([arm, seeds(runs), str(count), shown(mean(runs, _highest_rms), 1), shown(mean(runs, top1))])
    total = sum(len(r["spikes"]) for runs in records.values() for r in runs)
    number = sum(map(len, records.values()))
    counted = sum(r["counted"] for runs in records.values() for r in runs)
    here = [f"{total} loss spikes in {number} runs and {counted:,} steps that count."]
    for beta2 in BETA2[scale]:
        own = [r for arm, runs in records.items() if arm.endswith(f"β2 {beta2}") for r in runs]
        here.append(f"β2 {beta2}: {sum(len(r['spikes']) for r in own)} loss spikes (runs: {seeds(own)}).")
    columns = ["run", "seeds", "loss spikes", "highest RMS_t of the patch embedding", "top-1, %"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}


def _per_run(record: Record) -> float:
    return math.nan if record["diverged"] else float(len(record["spikes"]))


def _highest_rms(record: Record) -> float:
    values = [v for v in (record["rms"] or ())[record["settings"]["watch.ignore"] :] if v is not None]
    return max(values, default=math.nan)


def leads(records: Records) -> dict[str, Any]:
    """Figure 7: loss and RMS_t of the patch embedding on one axis, and how long one comes before the other."""
    runs = records[WATCHED]
    first = next((r for r in runs if r["spikes"]), runs[0])
    steps = range(1, len(first["loss"]) + 1)
    events = [{"x": s["step"], "label": "loss spike"} for s in first["spikes"]]
    part = _around(first)
    lines = [
        {"name": name, "form": "line", "x": [*steps][part], "y": (first[key] or [])[part]}
        for name, key in (("loss", "loss"), ("RMS_t of the patch embedding", "rms"))
    ]
    title = f"seed {first['seed']}"
    panels = [
        panel(title, "step", "contrastive loss", lines[:1], events=events),
        panel(title, "step", "RMS_t", lines[1:], events=events, levels=level(Rules().rms, "event"), log="y"),
    ]
    spikes = [s for r in runs for s in r["spikes"]]
    before = [s["leads"][PATCH_EMBEDDING] for s in spikes if PATCH_EMBEDDING in s["leads"]]
    counts = [before.count(lead) for lead in range(1, Rules().lead + 1)]
    bars = {"name": "spikes", "form": "bars", "x": [*range(len(counts))], "y": counts}
    panels.append(
        panel(
            "steps from the first high RMS_t within 8 to the spike",
            [str(n) for n in range(1, len(counts) + 1)],
            "loss spikes",
            [bars],
        )
    )
    by_chance = [(100 * r["chance"], None) if r["chance"] is not None else (math.nan, None) for r in runs]
    rows = [
        [str(r["seed"]), str(len(r["spikes"])), _leads(r), f"{shown(c, 1)} %"]
        for r, c in zip(runs, by_chance, strict=True)
    ]
    share = sum(c for c, _ in by_chance) / len(runs)
    here = [
        f"{len(spikes)} loss spikes in {len(runs)} runs; RMS_t of the patch embedding was high 1 to {Rules().lead} "
        f"steps before {len(before)} of them, where {shown((share, None), 1)} % would be so by chance; that of any "
        f"watched tensor before {sum(bool(s['leads']) for s in spikes)}."
    ]
    columns = ["seed", "loss spikes", "RMS_t of the patch embedding high, steps before", "by chance"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}


def _around(record: Record, reach: int = 150) -> slice:
    """The steps near the first spike, or all."""
    if not record["spikes"]:
        return slice(None)
    step = record["spikes"][0]["step"]
    return slice(max(0, step - reach), step + reach)


def _leads(record: Record) -> str:
    found = [str(s["leads"].get(PATCH_EMBEDDING, "not")) for s in record["spikes"]]
    return ", ".join(found) or "–"


def optimizers(records: Records) -> dict[str, Any]:
    """Figure 8: accuracy and spikes by optimizer and β2."""
    betas = list(dict.fromkeys(arm.rpartition(" ")[2] for arm in records))
    panels = []
    for title, value, label in (
        ("accuracy", top1, "zero-shot top-1 (%)"),
        ("spikes", _per_run, "loss spikes in a run"),
    ):
        own = [
            series(o, range(len(betas)), [mean(records[f"{o}, β2 {b}"], value) for b in betas], "line+points")
            for o in OPTIMIZERS
        ]
        more = {"levels": level(chance(records), "chance")} if value is top1 else {}
        panels.append(panel(title, [f"β2 {b}" for b in betas], label, own, **more))
    rows = []
    for arm, runs in records.items():
        count = [str(len(r["spikes"])) for r in runs]
        rows.append([arm, seeds(runs), ", ".join(count), shown(mean(runs, _highest_rms), 1), shown(mean(runs, top1))])
    here = []
    for optimizer in OPTIMIZERS:
        own = [r for arm, runs in records.items() if arm.rpartition(", β2")[0] == optimizer for r in runs]
        found = [m for b in betas if math.isfinite((m := mean(records[f"{optimizer}, β2 {b}"], top1))[0])]
        best = max(found, key=lambda m: m[0], default=(math.nan, None))
        here.append(
            f"{optimizer}: {sum(len(r['spikes']) for r in own)} loss spikes (runs: {seeds(own)}), best top-1 "
            f"{shown(best)} %."
        )
    columns = ["run", "seeds", "loss spikes of each", "highest RMS_t of the patch embedding", "top-1, %"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}
