"""Figures of speed: the operations of one linear layer, and whole training steps."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_linear import operations

from clipq.kernels import implementation
from clipq.lowp.measure import milliseconds
from paper.grid import Options, run_grid
from paper.panels import mean, panel, series, shown
from paper.precision import COST, NAMES, PAYING
from paper.record import made_on

WIDTHS = {"small": (768, 1024, 1280, 1664), "tiny": (64, 128)}
TOKENS = {"small": (8192, 33024, 65536), "tiny": (256, 512)}
RECIPE = "switchback"
BF16 = ("bf16 output", "bf16 input gradient", "bf16 weight gradient")
QUANTIZE = ("quantize X", "quantize W", "quantize G and sum for the bias")
PRODUCTS = ("output", "input gradient")
MODELS = ("ViT-B-16", "ViT-L-14", "ViT-H-14")
COLUMNS = ("bf16", "llm_int8", "switchback", "switchback_fp8", "open_clip_compiled", "torchao_fp8_rowwise_with_gw_hp")
EVEN = [{"y": 1, "label": ""}]
PEERS = {"open_clip_compiled": "OpenCLIP, compiled", "torchao_fp8_rowwise_with_gw_hp": "torchao fp8, dW in 16 bits"}


def _cpu_milliseconds(f: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        f()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _measured(scale: str) -> dict[tuple[int, int], dict[str, float]]:
    """Milliseconds of each operation of the layer width → 4 width, by width and tokens."""
    on_gpu = torch.cuda.is_available()
    device, timer = ("cuda", milliseconds) if on_gpu else ("cpu", _cpu_milliseconds)
    torch.manual_seed(0)
    # the full sizes of a GPU would take a CPU an hour, and say nothing of one
    sizes = "small" if on_gpu and scale != "tiny" else "tiny"
    return {
        (width, tokens): operations(tokens, width, 4 * width, RECIPE, device, timer)
        for width in WIDTHS[sizes]
        for tokens in TOKENS[sizes]
    }


def layer(options: Options) -> dict[str, Any]:
    """Figure 3: time of each operation of a linear layer, the share of quantizing, and the layer's gain."""
    times = _measured(options.scale)
    widths, tokens = (list(dict.fromkeys(key[n] for key in times)) for n in (0, 1))
    shared = "bf16 weight gradient"
    ours = {k: sum(t[n] for n in (*QUANTIZE, *PRODUCTS, shared)) for k, t in times.items()}
    theirs = {k: sum(t[n] for n in (*BF16, "bf16 bias gradient")) for k, t in times.items()}
    shares = {k: 100 * sum(t[n] for n in QUANTIZE) / ours[k] for k, t in times.items()}
    gains = {k: theirs[k] / ours[k] for k in times}
    largest = tokens[-1]

    def lines(values: dict[tuple[int, int], float]) -> list[dict[str, Any]]:
        return [_line(f"{n:,} tokens", widths, [values[w, n] for w in widths]) for n in tokens]

    names = [n for n in next(iter(times.values())) if n != "bf16 bias gradient"]
    each = [_line(name, widths, [times[w, largest][name] for w in widths]) for name in names]
    panels = [
        panel(f"operations, {largest:,} tokens", "width", "milliseconds", each, log="y"),
        panel("quantizing", "width", "share of the layer's time (%)", lines(shares)),
        panel(
            "the layer's gain",
            "width",
            "time in bf16 / time of SwitchBack",
            lines(gains),
            levels=EVEN,
        ),
    ]
    rows = [
        [str(w), f"{n:,}", f"{theirs[w, n]:.3f}", f"{ours[w, n]:.3f}", f"{gains[w, n]:.2f}", f"{shares[w, n]:.0f} %"]
        for w, n in times
    ]
    here = [
        f"Kernels: {implementation('cuda' if torch.cuda.is_available() else 'cpu')}.",
        f"The layer's operations gain {min(gains.values()):.2f} to {max(gains.values()):.2f}; quantizing takes "
        f"{min(shares.values()):.0f} to {max(shares.values()):.0f} % of a layer's time.",
    ]
    columns = ["width", "tokens", "bf16, ms", "SwitchBack, ms", "gain", "quantizing"]
    return {"panels": panels, "table": {"columns": columns, "rows": rows}, "here": here}


def _line(name: str, x: list[int], y: list[float]) -> dict[str, Any]:
    return {"name": name, "form": "line+points", "x": x, "y": [round(v, 5) for v in y]}


def steps(options: Options) -> dict[str, Any]:
    """Figure 4: training speed over bf16 by model; on a CPU the trainer's own, of a toy."""
    found, facts = _gpu_steps() if torch.cuda.is_available() and options.scale != "tiny" else _toy_steps(options)
    names, models = NAMES | PEERS, list(found)
    panels, rows, here = [], [], []
    for how in next(iter(found.values())):
        rates = {m: found[m][how] for m in models}
        gains = {c: [rates[m][c] / rates[m]["bf16"] for m in models] for c in rates[models[0]] if c != "bf16"}
        bars = [
            series(names[c], range(len(models)), [(v, None) for v in values], "bars") for c, values in gains.items()
        ]
        panels.append(panel(how, models, "images/s over those of bf16", bars, levels=EVEN))
        here += [
            f"{names[c]}, {how}: {', '.join(f'{m} {shown((v, None))}' for m, v in zip(models, values, strict=True))}."
            for c, values in gains.items()
        ]
        rows += [
            [model, names[column], how, shown((rate, None), 0), shown((rate / own["bf16"], None), 3)]
            for model, own in rates.items()
            for column, rate in own.items()
        ]
    table = {"columns": ["model", "step", "launched", "images/s", "to bf16"], "rows": rows}
    return {"panels": panels, "table": table, "here": here, "environment": facts}


Rates = dict[str, dict[str, dict[str, float]]]
"""Model -> how the step is launched -> column -> images a second, NaN of a peer that does not run."""


def _gpu_steps() -> tuple[Rates, dict[str, str]]:
    """By `bench_step.py`, which says itself what it ran on."""
    script = Path(__file__).resolve().parents[1] / "bench_step.py"
    found, facts = {}, []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "step.json"
            command = [sys.executable, str(script), "--model", model, "--graph", "--show", "0", "--steps", "8"]
            subprocess.run([*command, "--columns", *COLUMNS, "--out", str(out)], check=True)
            content = json.loads(out.read_text(encoding="utf-8"))
        results = content["results"]
        batch, columns = results["settings"]["batch"], results["columns"]
        found[model] = {
            how: {name: _rate(batch, c.get(key)) for name, c in columns.items() if key == "step_ms" or c.get(key)}
            for how, key in (("kernel by kernel", "step_ms"), ("as a CUDA graph", "graph_step_ms"))
        }
        facts.append(content["environment"])
    return found, made_on(facts)


def _rate(batch: int, milliseconds: float | None) -> float:
    return 1e3 * batch / milliseconds if milliseconds else math.nan


def _toy_steps(options: Options) -> tuple[Rates, dict[str, str]]:
    records = run_grid(PAYING, options)
    rates = {recipe: mean(records[recipe], lambda r: r["images_per_second"])[0] for recipe in COST}
    return {"toy": {"by the trainer": rates}}, made_on([r["environment"] for runs in records.values() for r in runs])
