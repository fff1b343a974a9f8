"""What the benchmarks share: timing, kernels that really ran, memory, a JSON file with device, versions and commit."""

from __future__ import annotations

import gc
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipq.build import build_run
from clipq.config.hydra import composed, register, to_job
from clipq.config.schema import TrainJob
from clipq.dist.env import DistEnv
from clipq.log.console import Console
from clipq.log.folder import environment
from clipq.lowp.measure import milliseconds
from clipq.train.run import Run


def wall_milliseconds(f: Callable[[], Any], *, warmup: int, steps: int) -> list[float]:
    """Wall-clock time of each of `steps` calls back to back: launches and gaps count, as in training."""
    for _ in range(warmup):
        f()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        f()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def host_milliseconds(f: Callable[[], Any], *, steps: int) -> float:
    """Time that the host takes to launch a call: where it nears the GPU's time, launches are the limit."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        f()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * elapsed / steps


def kernels(f: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """GPU kernels of one call: name -> {"count", "ms"}, longest first. A speed-up without its kernels is none."""
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profiler:
        f()
        torch.cuda.synchronize()
    counts, times = Counter(), Counter()
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:  # pyright: ignore[reportPrivateImportUsage]
            counts[event.name[:90]] += 1
            times[event.name[:90]] += event.time_range.elapsed_us() / 1e3
    if not counts:
        raise SystemExit("the profiler saw no GPU kernel: nothing can be said of what ran")
    return {name: {"count": counts[name], "ms": round(ms, 3)} for name, ms in times.most_common()}


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (milliseconds(lambda: target.copy_(source)) / 1e3)


def alone(script: str, part: str, gpus: int = 1) -> dict[str, Any]:
    """One part of a benchmark, by the same command with `--only` in a process of its own (for each GPU one), free of
    what another left in memory and in the compiler.

    {"error": its last line} where it does not run: of a peer that is a result too.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(gpus)] if gpus > 1 else []
        command = [sys.executable, *torchrun, script, *sys.argv[1:], "--only", part, "--out", str(path)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if path.exists():
            return json.loads(path.read_text())
        print(done.stderr[-3000:], file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}


def free_memory() -> None:
    """Gives everything back and starts the count of the peak anew."""
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def run_of(env: DistEnv, *overrides: str, folder: Path = Path("/tmp/clipq_bench")) -> Run:
    """What clipq-train builds of these settings; its shards are only looked at."""
    register({})
    job = to_job(composed("train", [*overrides, "name=x"]), TrainJob)
    return build_run(job, env, folder, "", Console(enabled=False))


def batch_of(run: Run) -> dict[str, Any]:
    """A random batch of this rank on its device, as the loader gives it."""
    size, g, device = run.batch_size // run.env.world_size, torch.Generator().manual_seed(0), run.env.device
    model: Any = run.state.model
    pixels = model.visual.image_size
    height, width = pixels if isinstance(pixels, tuple) else (pixels, pixels)
    image = torch.randint(0, 256, (size, 3, height, width), generator=g, dtype=torch.uint8)
    text = torch.randint(1, 49407, (size, model.context_length), generator=g, dtype=torch.int32)
    shown = {"image": image.to(device), "text": text.to(device), "key": [str(n) for n in range(size)]}
    return shown | {"place": None, "lost": 0, "filtered": {}, "sources": {}}


def median(values: list[float]) -> float:
    return statistics.median(values)


def write(path: str | Path, kind: str, title: str, results: dict[str, Any]) -> None:
    """Writes results with what they were measured on."""
    on_gpu = torch.cuda.is_available()
    facts = environment(torch.device("cuda" if on_gpu else "cpu"), 1)
    # where files lie is of one machine
    places = r" ((--out(put)?[ =]|--shards[ =]|--openclip[ =]|data\.\w+=)('[^']*'|\S+)|'data\.\w+=[^']*')"
    facts["command"] = re.sub(places, "", facts["command"])
    content = {
        "title": title,
        "kind": kind,
        "environment": facts,
        "power": _power() if on_gpu else "",
        "results": results,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _power() -> str:
    query = ["nvidia-smi", "--query-gpu=power.limit,clocks.max.sm,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()
