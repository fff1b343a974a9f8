"""What the benchmarks share: timing, kernels that really ran, memory, a JSON file with device, versions and commit."""

from __future__ import annotations

import gc
import itertools
import json
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipq.log.folder import environment
from clipq.lowp.measure import milliseconds


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


def free_memory() -> None:
    """Gives everything back and starts the count of the peak anew."""
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def median(values: list[float]) -> float:
    return statistics.median(values)


def write(path: str | Path, kind: str, title: str, results: dict[str, Any]) -> None:
    """Writes results with what they were measured on."""
    on_gpu = torch.cuda.is_available()
    facts = environment(torch.device("cuda" if on_gpu else "cpu"), 1)
    # where files lie is of one machine
    facts["command"] = re.sub(
        r" (--out(put)?[ =]|--shards[ =]|--openclip[ =]|data\.root=)('[^']*'|\S+)", "", facts["command"]
    )
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
