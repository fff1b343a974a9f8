"""Time and memory of an optimizer's step: StableAdamW's three paths, torch's AdamW with and without clipping, and
torch-optimi's StableAdamW.

bench_optimizer.py --out docs/benchmarks/optimizer_h100.json

Parameters of a whole model, random gradients, float32. A step moves at least 36 bytes for each parameter: gradient
and second moment read for RMS_t, then gradient, parameter and both moments read, parameter and moments written.
AdamW without clipping needs 28.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from bench_common import copy_bandwidth, free_memory, host_milliseconds, kernels, median, wall_milliseconds, write
from torch import nn

from clipq.model.clip import create_model
from clipq.optim.stable_adamw import StableAdamW

FLOOR = 36
MODELS = ("ViT-H-14", "ViT-B-32", "toy")
Step = Callable[[], Any]


def shapes(name: str) -> list[torch.Size]:
    """Shapes of the model's parameters; the toy is a perceptron of two layers."""
    if name == "toy":
        return [torch.Size(s) for s in ((256, 128), (256,), (128, 256), (128,))]
    with torch.device("cuda"):  # where random weights are made fast
        return [p.shape for p in create_model(name).model.parameters()]


def stable(params: list[nn.Parameter], **path: bool) -> Step:
    return StableAdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.2, **path).step


def adamw(params: list[nn.Parameter], *, clip: bool, **path: bool) -> Step:
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.2, **path)
    if not clip:
        return optimizer.step

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()

    return step


def optimi(params: list[nn.Parameter], **path: bool) -> Step:
    from optimi import StableAdamW as OptimiStableAdamW

    return OptimiStableAdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.2, **path).step


COLUMNS: dict[str, Callable[[list[nn.Parameter]], Step]] = {
    "StableAdamW, fused": functools.partial(stable, fused=True),
    "StableAdamW, foreach": functools.partial(stable, foreach=True),
    "StableAdamW, reference": functools.partial(stable, foreach=False, fused=False),
    "torch AdamW, fused": functools.partial(adamw, clip=False, fused=True),
    "torch AdamW, fused, with clip_grad_norm_": functools.partial(adamw, clip=True, fused=True),
    "torch AdamW, foreach, with clip_grad_norm_": functools.partial(adamw, clip=True, foreach=True),
    "optimi StableAdamW, loop": functools.partial(optimi, foreach=False, triton=False),
    "optimi StableAdamW, foreach": functools.partial(optimi, foreach=True, triton=False),
    "optimi StableAdamW, triton": functools.partial(optimi, foreach=False, triton=True),
}


def measure(sizes: list[torch.Size], make: Callable[[list[nn.Parameter]], Step]) -> dict[str, Any]:
    """Milliseconds of a step and of launching it, memory that it takes beyond weights, gradients and state."""
    free_memory()
    params = [nn.Parameter(0.02 * torch.randn(s, device="cuda")) for s in sizes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    step = make(params)
    step()
    step()
    free_memory()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    times = [median(wall_milliseconds(step, warmup=5, steps=20)) for _ in range(2)]
    ran = kernels(step)
    return {
        "ms": min(times),
        "ms_again": max(times),
        "host_ms": host_milliseconds(step, steps=10),
        "extra_mib": extra / 2**20,
        "launches": sum(k["count"] for k in ran.values()),
        "kernels": dict(list(ran.items())[:4]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {"copy_bandwidth": bandwidth, "models": {}}
    for name in options.models:
        sizes = shapes(name)
        count = sum(s.numel() for s in sizes)
        columns: dict[str, Any] = {}
        print(f"{name}: {count / 1e6:.1f} M parameters in {len(sizes)} tensors, copy at {bandwidth / 1e12:.2f} TB/s")
        for title, make in COLUMNS.items():
            column = columns[title] = measure(sizes, make)
            share = FLOOR * count / (column["ms"] / 1e3) / bandwidth
            column["share_of_copy_bandwidth"] = share if title.startswith("StableAdamW") else None
            print(
                f"  {title:44} {column['ms']:8.3f} ms ({column['ms_again']:.3f}), host {column['host_ms']:.3f} ms, "
                f"{column['launches']} launches, {column['extra_mib']:.0f} MiB, {share:.0%} at {FLOOR} B"
            )
        results["models"][name] = {"parameters": count, "tensors": len(sizes), "columns": columns}
    write(options.out, "optimizer", "Optimizer steps", results)


if __name__ == "__main__":
    main()
