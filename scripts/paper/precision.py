"""Figures of recipes: accuracy by size, losses, what rescues tensor-wise fp8, formats beyond the paper, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paper.grid import Grid
from paper.panels import (
    Record,
    Records,
    chance,
    curve,
    difference,
    final_loss,
    level,
    mean,
    panel,
    seeds,
    series,
    shown,
    top1,
)

SIZES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "paper": {"Base": ["model=vit_b_16"], "Large": ["model=vit_l_14"], "Huge": ["model=vit_h_14"]},
    "small": {
        "Mi": ["model=vit_mi_8_32", "model.image_size=64"],
        "S": ["model=vit_s_8_64"],
        "B": ["model=vit_b_16_64"],
    },
    "tiny": {"Mi": []},
}
NAMES = {
    "bf16": "bf16",
    "llm_int8": "LLM.int8()",
    "switchback": "SwitchBack",
    "switchback_q": "SwitchBackQ",
    "int8_stochastic": "int8, dW stochastic",
    "fp8_sim": "fp8, one scale a tensor",
    "fp8": "fp8, one scale a tensor, real",
    "switchback_fp8_sim": "SwitchBack fp8",
    "switchback_fp8": "SwitchBack fp8, real",
}
INT8, FP8 = ("bf16", "llm_int8", "switchback"), ("bf16", "fp8_sim", "switchback_fp8_sim")
FORMATS = ("bf16", "switchback", "switchback_q", "int8_stochastic", "llm_int8", "switchback_fp8_sim", "switchback_fp8",
           "fp8_sim", "fp8")  # fmt: skip
COST = ("bf16", "switchback", "switchback_fp8")
RESCUES = {
    "bf16": ["backend=bf16"],
    "fp8, one scale a tensor": [],
    "… gradient clipped at 1": ["optim.clip_norm=1"],
    "… query-key norm": ["model.qk_norm=true"],
    "… layer scale from zero": ["model.layer_scale_init=0"],
}


def _arms(scale: str, sizes: Sequence[str], recipes: Sequence[str]) -> dict[str, Sequence[str]]:
    return {f"{size}, {recipe}": [*SIZES[scale][size], f"backend={recipe}"] for size in sizes for recipe in recipes}


SEEDS = {"paper": 1, "small": 3, "tiny": 1}
PRECISION = Grid(
    experiment="fig1_precision",
    arms={scale: _arms(scale, [*sizes], [*INT8, *FP8[1:]]) for scale, sizes in SIZES.items()},
    seeds=SEEDS,
)
MIDDLE = {"paper": "Large", "small": "S", "tiny": "Mi"}
FORMAT = Grid(
    experiment="fig1_precision",
    arms={scale: _arms(scale, [size], FORMATS) for scale, size in MIDDLE.items()},
    seeds=SEEDS,
)
RESCUE = Grid(experiment="fig5_rescue", arms=dict.fromkeys(SIZES, RESCUES), seeds=SEEDS)
# narrow models gain nothing from 8 bits
PAID = {"paper": ["eval.every=2500"], "small": [*SIZES["small"]["B"], "eval.every=100"], "tiny": ["eval.every=3"]}
PAYING = Grid(
    experiment="fig11_cost",
    arms={scale: {recipe: [f"backend={recipe}", *own] for recipe in COST} for scale, own in PAID.items()},
    seeds=SEEDS,
)


def _sizes(records: Records) -> list[str]:
    return list(dict.fromkeys(arm.partition(", ")[0] for arm in records))


def accuracy(records: Records) -> dict[str, Any]:
    """Figure 1: zero-shot accuracy against model size, int8 and fp8."""
    sizes = _sizes(records)
    panels, rows, here = [], [], []
    for title, recipes in (("int8", INT8), ("fp8, simulated", FP8)):
        own = [
            series(
                NAMES[recipe], range(len(sizes)), [mean(records[f"{s}, {recipe}"], top1) for s in sizes], "line+points"
            )
            for recipe in recipes
        ]
        panels.append(panel(title, sizes, "zero-shot top-1 (%)", own, levels=level(chance(records), "chance")))
    for recipe in dict.fromkeys([*INT8, *FP8]):
        for size in sizes:
            runs, base = records[f"{size}, {recipe}"], records[f"{size}, bf16"]
            rows.append([NAMES[recipe], size, *_result(runs, base)])
        if recipe != "bf16":
            here.append(
                _sentence(NAMES[recipe], sizes[-1], records[f"{sizes[-1]}, {recipe}"], records[f"{sizes[-1]}, bf16"])
            )
    columns = ["recipe", "model", "seeds", "top-1, %", "to bf16, points", "final loss", "to bf16"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}


def _result(runs: Sequence[Record], base: Sequence[Record]) -> list[str]:
    """Cells: seeds, accuracy and final loss, each with its difference to the same seeds of `base`."""
    cells = [seeds(runs)]
    for value, digits in ((top1, 2), (final_loss, 4)):
        own = "–" if runs is base else shown(difference(runs, base, value), digits, sign=True)
        cells += [shown(mean(runs, value), digits), own]
    return cells


def _sentence(name: str, where: str, runs: Sequence[Record], base: Sequence[Record]) -> str:
    """Whether a recipe differs from bf16 by more than seeds do."""
    delta, half = difference(runs, base, top1)
    if not math.isfinite(delta):
        diverged = "; ".join(f"{n} diverged in {d} of {len(own)} runs" for n, own in ((name, runs), ("bf16", base))
                             if (d := sum(r["diverged"] is not None for r in own)))  # fmt: skip
        return f"{diverged or f'{name} has no accuracy'} ({where})."
    told = f"{name} is {delta:+.2f} points from bf16 ({where}"
    if half is None:
        return f"{told}, one seed: no interval)."
    verdict = "more than seeds explain" if abs(delta) > half else "within the noise of seeds"
    return f"{told}, 95 % interval ± {half:.2f}): {verdict}."


def losses(records: Records) -> dict[str, Any]:
    """Figure 2: loss of the same runs, for the largest model."""
    size = _sizes(records)[-1]
    panels = [
        panel(
            f"{title}, {size}", "step", "contrastive loss", [curve(NAMES[r], records[f"{size}, {r}"]) for r in recipes]
        )
        for title, recipes in (("int8", INT8), ("fp8, simulated", FP8))
    ]
    base = records[f"{size}, bf16"]
    rows = [[NAMES[r], *_result(records[f"{size}, {r}"], base)[3:]] for r in dict.fromkeys([*INT8, *FP8])]
    here = []
    for recipe in dict.fromkeys([*INT8[1:], *FP8[1:]]):
        own = records[f"{size}, {recipe}"]
        delta = difference(own, base, final_loss)
        end = (
            f"ends {shown(delta, 4, sign=True)} from the loss of bf16"
            if math.isfinite(delta[0])
            else "has no final loss"
        )
        here.append(f"{NAMES[recipe]} {end} ({size}; seeds: {seeds(own)}).")
    return {"panels": panels, "table": {"columns": ["recipe", "final loss", "to bf16"], "rows": rows}, "here": here}


def rescue(records: Records) -> dict[str, Any]:
    """Figure 5: losses of tensor-wise fp8 with what may rescue it, and the magnitudes of features per block."""
    plain, scaled = "fp8, one scale a tensor", "… layer scale from zero"
    magnitudes = []
    for arm in (plain, scaled):
        for when in ("first", "last"):
            found = [r["features"][when]["magnitudes"] for r in records[arm] if r["features"]]
            blocks = [name for name in (found[0] if found else ()) if name.startswith("visual.")]
            values = [mean(found, lambda magnitudes, name=name: magnitudes[name]) for name in blocks]
            label = f"{'layer scale' if arm == scaled else 'plain'}, {'start' if when == 'first' else 'end'}"
            magnitudes.append(series(label, range(1, len(blocks) + 1), values, "line+points"))
    panels = [
        panel("loss", "step", "contrastive loss", [curve(arm, runs) for arm, runs in records.items()]),
        panel("features of the image tower", "block", "mean |x|", magnitudes, log="y"),
    ]
    base = records["bf16"]
    rows = [[arm, *_result(runs, base)] for arm, runs in records.items()]
    here = [
        _sentence(arm, base[0]["settings"]["model.name"], runs, base)
        for arm, runs in records.items()
        if runs is not base
    ]
    grown = [m["y"][-1] / m["y"][0] for m in magnitudes if m["y"] and m["y"][0] and m["y"][-1]]
    if len(grown) == 4:
        here.append(
            f"From the first block to the last, features grow {grown[0]:.1f} times at the start and {grown[1]:.1f} "
            f"times at the end; with layer scale {grown[2]:.1f} and {grown[3]:.1f} times."
        )
    columns = ["run", "seeds", "top-1, %", "to bf16, points", "final loss", "to bf16"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}


def formats(records: Records) -> dict[str, Any]:
    """Figure 10: recipes beyond the paper beside its own, one model."""
    size = _sizes(records)[0]
    base = records[f"{size}, bf16"]
    arms = {NAMES[recipe]: records[f"{size}, {recipe}"] for recipe in FORMATS}
    deltas = [difference(runs, base, top1) for runs in arms.values()]
    loss = [difference(runs, base, final_loss) for runs in arms.values()]
    panels = [
        panel(
            "accuracy", [*arms], "top-1, points to bf16", [series("mean over seeds", range(len(arms)), deltas, "bars")]
        ),
        panel("final loss", [*arms], "loss, to bf16", [series("mean over seeds", range(len(arms)), loss, "bars")]),
    ]
    rows = [[name, *_result(runs, base)] for name, runs in arms.items()]
    here = [_sentence(name, size, runs, base) for name, runs in arms.items() if runs is not base]
    columns = ["recipe", "seeds", "top-1, %", "to bf16, points", "final loss", "to bf16"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}


def cost(records: Records) -> dict[str, Any]:
    """Figure 11: accuracy against time, and against energy where the board's power was read."""
    panels = [_against(records, "training time (s)", lambda r, e: e["seconds"])]
    powered = all(r.get("watts") for runs in records.values() for r in runs)
    if powered:
        panels.append(_against(records, "energy of the GPU (kJ)", lambda r, e: e["seconds"] * r["watts"] / 1e3))
    base, rows = records["bf16"], []
    speeds = {recipe: mean(runs, lambda r: r["images_per_second"]) for recipe, runs in records.items()}
    for recipe, runs in records.items():
        watts = mean(runs, lambda r: r.get("watts") or math.nan)
        joules = mean(runs, lambda r: 1e3 * (r.get("watts") or math.nan) / r["images_per_second"])
        rows.append([NAMES[recipe], shown(speeds[recipe], 0), shown(watts, 0), shown(joules, 1), *_result(runs, base)])
    here = [
        f"{NAMES[recipe]} trains {speed[0] / speeds['bf16'][0]:.2f} times as many images a second as bf16."
        for recipe, speed in speeds.items()
        if recipe != "bf16"
    ]
    if not powered:
        here.append("No power was read: this device has no nvidia-smi, or runs shared it.")
    columns = ["recipe", "images/s", "W", "mJ an image", "seeds", "top-1, %", "to bf16", "final loss", "to bf16"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}


def _against(records: Records, label: str, x: Any) -> dict[str, Any]:
    own = []
    for recipe, runs in records.items():
        tasks = [next(iter(r["evaluations"].values()), []) for r in runs]
        places = range(min(map(len, tasks)))
        xs = [sum(x(r, task[n]) for r, task in zip(runs, tasks, strict=True)) / len(runs) for n in places]
        values = [mean([task[n] for task in tasks], lambda e: 100 * e["top1"]) for n in places]
        own.append(series(NAMES[recipe], xs, values, "line+points"))
    return panel(label.partition(" (")[0], label, "zero-shot top-1 (%)", own, levels=level(chance(records), "chance"))
