"""Provokes a loss spike under AdamW by a change of the data, and shows what prevents it.

provoke_spike.py SHARDS WORK --out docs/benchmarks/spike_h100.json [--seeds 3] [--jobs 4]

SHARDS are captioned photographs (Tiny ImageNet's train/*.tar.gz). WORK gets two copies of them, one through a red
filter and one in full colour. Then `clipq-train experiment=spike` runs with each optimizer below, several at a time;
runs go to runs/spike/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_common import write
from paper.red_filter import make_shards

from clipq.report.runs import read_run
from clipq.report.stability import PATCH_EMBEDDING, analyse

RUNS = Path("runs/spike")
CHANGE = 2016
"""Steps before the first pairs in colour."""
AROUND = (60, 140)
"""Steps before and after that are recorded."""
VARIANTS = {
    "AdamW, β2 0.999": [],
    "AdamW, β2 0.99": ["optim.beta2=0.99"],
    "AdamW, β2 0.95": ["optim.beta2=0.95"],
    "AdamW, β2 0.999, norm clipped at 1": ["optim.clip_norm=1"],
    "StableAdamW, β2 0.999": ["optim=stable_adamw", "optim.beta2=0.999"],
}
ONCE = [name for name in VARIANTS if name not in ("AdamW, β2 0.999", "StableAdamW, β2 0.999")]
"""Variants that run with the first seed only."""


def train(variant: str, seed: int, work: Path, overrides: list[str]) -> dict[str, Any]:
    """One run, and what `summary` says of it."""
    name = f"variant{list(VARIANTS).index(variant)}_seed{seed}"
    command = [sys.executable, "-m", "clipq.cli.train", "experiment=spike", f"data.root={work}", *VARIANTS[variant]]
    command += [f"seed={seed}", f"runs={RUNS}", f"name={name}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    found = {"seed": seed, **summary(RUNS / name)}
    print(variant, {k: v for k, v in found.items() if k not in ("loss", "rms")}, flush=True)
    return found


def summary(folder: Path) -> dict[str, Any]:
    """Loss and the patch embedding's RMS_t around the change, and the spikes that the rules find after it."""
    run = read_run(folder)
    part = slice(CHANGE - AROUND[0], CHANGE + AROUND[1])
    loss, rms = run.train["loss"][part], run.rms[PATCH_EMBEDDING][part]
    spikes = [
        {"step": s.step, "loss": s.loss, "mean": s.mean, "lead": s.leads.get(PATCH_EMBEDDING)}
        for s in analyse(run).spikes
        if CHANGE < s.step <= CHANGE + AROUND[1]
    ]
    return {
        "before": round(float(loss[: AROUND[0]].mean()), 3),
        "highest": round(float(loss[AROUND[0] :].max()), 3),
        "highest_rms": round(float(rms[AROUND[0] :].max()), 2),
        "spikes": spikes,
        "loss": [round(float(v), 4) for v in loss],
        "rms": [round(float(v), 3) for v in rms],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="runs with and without update clipping")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options, overrides = parser.parse_known_args()
    make_shards(options.shards, options.work)
    jobs = [(v, s) for s in range(options.seeds) for v in VARIANTS if s == 0 or v not in ONCE]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda job: train(job[0], job[1], options.work, overrides), jobs))
    variants = {v: [run for (name, _), run in zip(jobs, found, strict=True) if name == v] for v in VARIANTS}
    results = {"change": CHANGE, "first": CHANGE - AROUND[0] + 1, "variants": variants}
    write(options.out, "spike", "A spike provoked by colour", results)


if __name__ == "__main__":
    main()
