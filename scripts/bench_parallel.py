"""What strategies, checkpointing and accumulation cost in time and memory, and how long a checkpoint holds training up:
the trainer's own steps, without its loader.

bench_parallel.py --out parallel_vit_l.json data.shards='/data/*.tar'
bench_parallel.py --save --model vit_h_14 --batch 64 --out save_vit_h.json data.shards='/data/*.tar'

With one GPU the trainer wraps nothing, whatever the strategy; here DDP and FSDP2 are put around the model as they are
on several, over NCCL with one process, so that what they cost by themselves is seen. Each setting is measured in
processes of its own. The trainer asks for shards, which are only looked at: batches are random and lie on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_common import alone, batch_of, median, run_of, wall_milliseconds, write

from clipq.dist.env import DistEnv, distributed
from clipq.train.graph import WARMUP_DDP
from clipq.train.loop import train_step
from clipq.train.run import Run

SETTINGS = {
    "none": ("parallel=none",),
    "ddp": ("parallel=ddp",),
    "fsdp": ("parallel=fsdp",),
    "fsdp, weights kept": ("parallel=fsdp", "parallel.reshard_after_forward=false"),
    "ddp, checkpointing": ("parallel=ddp", "model.grad_checkpointing=true"),
    "ddp, accumulation 4": ("parallel=ddp", "accumulation=4"),
    "fsdp, checkpointing": ("parallel=fsdp", "model.grad_checkpointing=true"),
    "fsdp, checkpointing, accumulation 4": ("parallel=fsdp", "model.grad_checkpointing=true", "accumulation=4"),
}


class Wrapping(DistEnv):
    """One process that is to be wrapped as if it were one of several."""

    @property
    def is_distributed(self) -> bool:
        return True


@contextmanager
def wrapping(name: str) -> Iterator[DistEnv]:
    with distributed("cuda") as env:
        if env.is_distributed or name == "none":
            yield env
            return
        store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=env.device)
        try:
            yield Wrapping(0, 1, 0, 1, env.device)
        finally:
            dist.destroy_process_group()


def one_step(run: Run, batch: dict[str, Any]) -> None:
    train_step(run, batch, 1e-5)
    run.state.step += 1


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    with wrapping(name) as env:
        pairs = f"batch_size={options.batch * env.world_size}"
        settings = (f"model={options.model}", f"backend={options.backend}", pairs, *options.overrides)
        run = run_of(env, *settings, *SETTINGS[name])
        batch, found = batch_of(run), dict[str, Any](recorded_ms=None)
        warmup = WARMUP_DDP + 3
        if run.graph is not None:
            times = wall_milliseconds(lambda: one_step(run, batch), warmup=warmup, steps=options.steps)
            found |= {"recorded_ms": median(times), "recorded_gib": torch.cuda.max_memory_reserved() / 2**30}
            run.graph.forget()
            run.graph, warmup = None, 3
        torch.cuda.reset_peak_memory_stats()
        times = wall_milliseconds(lambda: one_step(run, batch), warmup=warmup, steps=options.steps)
        found |= {"launched_ms": median(times), "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        return found | {"world_size": env.world_size}


def measure_save(options: argparse.Namespace) -> dict[str, Any]:
    """Checkpoints while training goes on; the first makes the buffers that the next use."""
    folder = Path(tempfile.mkdtemp(prefix="clipq_bench_"))
    with wrapping("none") as env:
        settings = (f"model={options.model}", f"backend={options.backend}", f"batch_size={options.batch}")
        run = run_of(env, *settings, *options.overrides, "checkpoint.keep_last=1", folder=folder)
        batch = batch_of(run)
        quiet = wall_milliseconds(lambda: one_step(run, batch), warmup=4, steps=10)
        found: dict[str, Any] = {"quiet_ms": median(quiet)}
        held, during, written = [], [], []
        for _ in range(options.saves):
            start = time.perf_counter()
            run.checkpoints.save(run.state, loader=run.loader_info, wait=False)
            held.append(time.perf_counter() - start)
            during.append(median(wall_milliseconds(lambda: one_step(run, batch), warmup=0, steps=10)))
            run.checkpoints.wait()
            written.append(time.perf_counter() - start)
            print(
                f"held {held[-1]:.3f} s, steps meanwhile {during[-1]:.1f} ms, written in {written[-1]:.1f} s",
                flush=True,
            )
        found |= {"held_s": held, "step_while_writing_ms": during, "written_s": written}
        found["bytes"] = sum(path.stat().st_size for path in folder.glob("checkpoints/step_*/*"))
        found["failures"] = [str(error) for _, error in run.checkpoints.failures()]
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="data for clipq-train")
    parser.add_argument("--model", default="vit_l_14")
    parser.add_argument("--backend", default="switchback")
    parser.add_argument("--batch", type=int, default=128, help="pairs of each GPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="measure checkpoints instead")
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", choices=[*SETTINGS, "save"], help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.only:
        found = measure_save(options) if options.only == "save" else measure(options, options.only)
        if os.environ.get("RANK", "0") == "0":
            Path(options.out).write_text(json.dumps(found))
        return
    facts: dict[str, Any] = {key: vars(options)[key] for key in ("model", "backend", "batch", "gpus")}
    if options.save:
        found = alone(__file__, "save")
        print(found, flush=True)
        write(options.out, "save", f"Checkpoints of {options.model}", facts | found)
        return
    facts["settings"] = {}
    for name in options.settings:
        facts["settings"][name] = alone(__file__, name, options.gpus)
        print(f"{name:36}", facts["settings"][name], flush=True)
        write(options.out, "parallel", f"Strategies, {options.model}", facts)


if __name__ == "__main__":
    main()
