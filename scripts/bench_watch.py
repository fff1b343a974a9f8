"""What watching costs: the trainer's own steps with the default instruments and with none, alternating, in one process.

bench_watch.py --out docs/benchmarks/watch_h100.json data=flickr8k data.root=FOLDER

The trainer asks for shards, which are only looked at: batches are random and lie on the device. The guard's gradient
norms are part of every step on both sides, and timed by themselves; so is the measurement of quantization errors, which
the default makes every 1000 steps.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from bench_common import batch_of, median, run_of, wall_milliseconds, write

from clipq.dist.env import distributed
from clipq.log.meters import Meter
from clipq.lowp.measure import milliseconds
from clipq.train.events import flush, measure_quantization
from clipq.train.guard import gradient_norms
from clipq.train.loop import train_step
from clipq.train.run import Run

OFF = ("watch.rms=[]", "watch.features=false")


def steps_of(run: Run, batch: dict[str, Any]) -> Any:
    """Ten steps as the loop makes them, one of which is watched, and the reading of their numbers."""
    meter = Meter(seconds=0.0, device=run.env.device, flops_per_image=run.flops_per_image, world_size=1)

    def ten() -> None:
        for _ in range(10):
            run.pending.append(train_step(run, batch, 1e-5))
            run.state.step += 1
        flush(run, meter, show=False)

    return ten


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="data for clipq-train")
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--backend", default="bf16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--graph", nargs="+", default=["auto", "off"], choices=["auto", "off"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {"model": options.model, "backend": options.backend, "batch": options.batch}
    with distributed("cuda") as env:
        for graph in options.graph:
            settings = (f"model={options.model}", f"backend={options.backend}", f"batch_size={options.batch}")
            settings = (*settings, *options.overrides, f"backend.cuda_graph={graph}")
            runs = {"watched": run_of(env, *settings), "unwatched": run_of(env, *settings, *OFF)}
            calls = {name: steps_of(run, batch_of(run)) for name, run in runs.items()}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):  # alternating: clocks drift
                for name, call in calls.items():
                    times[name] += [t / 10 for t in wall_milliseconds(call, warmup=1, steps=4)]
            found = {f"{name}_ms": median(values) for name, values in times.items()}
            found["cost"] = found["watched_ms"] / found["unwatched_ms"] - 1
            run = runs["watched"]
            params = list(run.state.model.parameters())
            found["gradient_norms_ms"] = milliseconds(lambda p=params: gradient_norms(p))
            batch = batch_of(run)
            start = time.perf_counter()
            measure_quantization(run, batch)
            torch.cuda.synchronize()
            found["quantization_ms"] = 1e3 * (
                time.perf_counter() - start
            )  # next to nothing where no layer is converted
            results["recorded" if graph == "auto" else "launched one by one"] = found
            print(graph, {name: round(value, 4) for name, value in found.items()})
            del runs, calls, run, params
            torch.cuda.empty_cache()
    write(options.out, "watch", "Cost of watching", results)


if __name__ == "__main__":
    main()
