"""Trains one small CLIP by every recipe from the same seeds, and compares losses and zero-shot accuracy.

compare_recipes.py --out docs/benchmarks/recipes_h100.json experiment=tiny_imagenet data.root=FOLDER steps=300

What follows the options goes to `clipq-train`. Runs go to runs/recipes/, several at a time; one that is there already
is read and not repeated. 95 % intervals of the mean over seeds are Student's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_common import write
from paper.record import interval

from clipq.lowp import RECIPES

RUNS = Path("runs/recipes")
EVERY = 10
"""Steps whose mean loss is one point of a curve; the last point is the final loss."""


def train(recipe: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run: its losses, a value for every ten steps, and the metrics of its last evaluation."""
    name = f"{recipe}_{seed}"
    command = [sys.executable, "-m", "clipq.cli.train", *overrides]
    command += [f"backend={recipe}", f"seed={seed}", f"runs={RUNS}", f"name={name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    rows = [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    metrics = [row for row in rows if row["kind"] == "eval"][-1]["metrics"]
    means = [round(statistics.mean(losses[n : n + EVERY]), 4) for n in range(0, len(losses), EVERY)]
    print(f"{recipe} seed {seed}: loss {means[-1]:.4f}, {metrics}", flush=True)
    return {"losses": means, "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--once", nargs="*", default=[], help="recipes that get one seed only")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the GPU")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options, overrides = parser.parse_known_args()
    jobs = [(r, s) for s in range(options.seeds) for r in options.recipes if s == 0 or r not in options.once]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: train(*job, overrides), jobs), strict=True))  # pyright: ignore[reportCallIssue]
    results: dict[str, Any] = {}
    for recipe in options.recipes:
        own = [run for (name, _), run in runs.items() if name == recipe]
        loss, top1 = (interval(v) for v in ([r["losses"][-1] for r in own], [r["metrics"]["top1"] for r in own]))
        results[recipe] = {"seeds": len(own), "loss": loss, "top1": top1, "runs": own}
        print(f"{recipe:20} loss {loss[0]:.4f} ± {loss[1] or 0:.4f}   top-1 {top1[0]:.2%} ± {top1[1] or 0:.2%}")
    write(options.out, "recipes", "Every recipe from the same seeds", results)


if __name__ == "__main__":
    main()
