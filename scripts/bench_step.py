"""Time and memory of one training step of a CLIP model, for each recipe and for what else a user can run.

bench_step.py --model ViT-H-14 --columns bf16 switchback open_clip_compiled --out docs/benchmarks/step_vit_h_h100.json

Random images and texts, the step of `clipq-train`: towers under autocast to bfloat16 over float32 weights (or with
bfloat16 weights where a column needs them), contrastive loss, backward, fused AdamW. Columns run one after another,
each in a process of its own, bf16 first and, with --again, last too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from bench_common import alone, host_milliseconds, kernels, median, wall_milliseconds, write
from torch import nn

from clipq.build_backend import COMPILER
from clipq.loss.contrastive import contrastive_loss
from clipq.lowp import RECIPES, convert_linears
from clipq.model.clip import create_model
from clipq.model.surgery import blocks

torch.set_float32_matmul_precision("highest")
# Blocks share the code of one forward, whose graphs torch counts together; beyond the limit they would run eagerly.
torch._dynamo.config.recompile_limit = 256


def in_blocks(name: str, layer: nn.Linear) -> bool:
    return "resblocks" in name


def ours(options: argparse.Namespace, recipe: str) -> nn.Module:
    model = ours_uncompiled(options)
    for line in convert_linears(model, recipe, filter=in_blocks).lines():
        print("   ", line)
    for _, block in blocks(model):
        block.forward = torch.compile(block.forward, fullgraph=True, options=COMPILER)
    return model


def as_shipped(options: argparse.Namespace, compiled: bool) -> nn.Module:
    with torch.device("cuda"):
        model = open_clip.create_model(
            options.model, output_dict=True, force_patch_dropout=options.patch_dropout
        ).cuda()
    if compiled:
        for tower in (model.visual.transformer, model.transformer):  # pyright: ignore
            for block in tower.resblocks:  # pyright: ignore
                block.forward = torch.compile(block.forward)
    return model


def torchao_float8(options: argparse.Namespace, recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]

    model = ours_uncompiled(options)
    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name(recipe),
        module_filter_fn=lambda layer, name: "resblocks" in name,
    )
    return compile_blocks(model)


def torchao_int8(options: argparse.Namespace) -> nn.Module:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, int8_mixed_precision_training  # pyright: ignore[reportMissingImports]
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    model = ours_uncompiled(options).to(torch.bfloat16)
    config = int8_mixed_precision_training(Int8MixedPrecisionTrainingConfig(), module_swap=True)
    quantize_(model, config, filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and "resblocks" in name)
    return compile_blocks(model)


def ours_uncompiled(options: argparse.Namespace) -> nn.Module:
    with torch.device("cuda"):  # initialises there; OpenCLIP then moves the model to the CPU
        return create_model(options.model, patch_dropout=options.patch_dropout).model.cuda()


def compile_blocks(model: nn.Module) -> nn.Module:
    for _, block in blocks(model):
        block.forward = torch.compile(block.forward)
    return model


OURS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    **{name: lambda options, name=name: ours(options, name) for name in RECIPES},
    "bf16_weights": lambda options: ours(options, "bf16").to(torch.bfloat16),
    "switchback_bf16_weights": lambda options: ours(options, "switchback").to(torch.bfloat16),
}
COLUMNS = OURS | {
    "open_clip": lambda options: as_shipped(options, compiled=False),
    "open_clip_compiled": lambda options: as_shipped(options, compiled=True),
    "torchao_fp8_rowwise": lambda options: torchao_float8(options, "rowwise"),
    "torchao_fp8_rowwise_with_gw_hp": lambda options: torchao_float8(options, "rowwise_with_gw_hp"),
    "torchao_int8_bf16_weights": torchao_int8,
}


def measure(options: argparse.Namespace, column: str) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    start = time.perf_counter()
    model = COLUMNS[column](options)
    size = model.visual.image_size  # pyright: ignore[reportAttributeAccessIssue]
    size = size if isinstance(size, tuple) else (size, size)
    weights = next(model.parameters()).dtype
    images = torch.randn(options.batch, 3, *size, device="cuda", dtype=weights)  # pyright: ignore
    texts = torch.randint(1, 49000, (options.batch, 77), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)
    model.train()

    def forward_backward() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=weights is torch.float32):
            out = model(images, texts)
        loss, _ = contrastive_loss(out["image_features"], out["text_features"], out["logit_scale"])
        loss.backward()
        return loss.detach()

    def step() -> torch.Tensor:
        loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    first = step().item()
    started = time.perf_counter() - start
    times = wall_milliseconds(step, warmup=options.warmup, steps=options.steps)
    host = host_milliseconds(step, steps=3)
    peak = torch.cuda.max_memory_allocated() / 2**30
    ran = kernels(step)
    busy = sum(k["ms"] for k in ran.values())
    last = step().item()
    recorded = options.graph and column in OURS
    graph = measure_graph(forward_backward, optimizer, options) if recorded else None
    return {
        "step_ms": median(times),
        "step_ms_min": min(times),
        "step_ms_max": max(times),
        "images_per_second": 1e3 * options.batch / median(times),
        "gpu_ms": busy,
        "host_ms": host,
        "peak_gib": peak,
        "start_seconds": started,
        "first_loss": first,
        "last_loss": last,
        "graph_step_ms": graph,
        "kernels": dict(list(ran.items())[: options.kernels]),
    }


def measure_graph(
    forward_backward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, options: argparse.Namespace
) -> float:
    """Step time with forward and backward recorded once as a CUDA graph: what is left when no launch costs anything."""
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_backward()

    def step() -> None:
        graph.replay()
        optimizer.step()

    times = wall_milliseconds(step, warmup=options.warmup, steps=options.steps)
    graph.reset()
    optimizer.zero_grad(set_to_none=True)
    return median(times)


def show(name: str, row: dict[str, Any], base: dict[str, Any], kernels: int) -> None:
    if "error" in row:
        print(f"{name:32} {row['error']}", flush=True)
        return
    print(
        f"{name:32} {row['step_ms']:7.1f} ms ({row['step_ms_min']:.1f}–{row['step_ms_max']:.1f})",
        f"{row['images_per_second']:7.0f} img/s  × {base['step_ms'] / row['step_ms']:.3f}  GPU {row['gpu_ms']:.1f}",
        f"× {base['gpu_ms'] / row['gpu_ms']:.3f}  host {row['host_ms']:.1f}  {row['peak_gib']:.1f} GiB",
        f"start {row['start_seconds']:.0f} s  loss {row['first_loss']:.4f} {row['last_loss']:.4f}",
        flush=True,
    )
    if row["graph_step_ms"]:
        graph_base = base["graph_step_ms"] / row["graph_step_ms"]
        print(f"{'':32} {row['graph_step_ms']:7.1f} ms as a CUDA graph  × {graph_base:.3f}")
    for kernel, k in list(row["kernels"].items())[:kernels]:
        print(f"      {k['ms']:8.2f} ms {k['count']:5.0f} × {kernel[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-H-14", help="an OpenCLIP name")
    parser.add_argument("--columns", nargs="+", default=["bf16", "switchback"], choices=list(COLUMNS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--patch-dropout", type=float, default=0.5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--graph", action="store_true", help="measure our own steps as CUDA graphs too")
    parser.add_argument("--kernels", type=int, default=40, help="kernels listed in the JSON, longest first")
    parser.add_argument("--show", type=int, default=25, help="kernels printed")
    parser.add_argument("--again", action="store_true", help="measure the first column once more at the end")
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--only", choices=list(COLUMNS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        Path(options.out).write_text(json.dumps(measure(options, options.only)))
        return
    results: dict[str, Any] = {}
    order = [*options.columns, *([options.columns[0]] if options.again else [])]
    for column in order:
        name = column if column not in results else f"{column}_again"
        results[name] = alone(__file__, column)
        if "error" in results[order[0]]:
            raise SystemExit(f"{order[0]} does not run: {results[order[0]]['error']}")
        show(name, results[name], results[order[0]], 0 if name.endswith("_again") else options.show)
        settings = {k: v for k, v in vars(options).items() if k not in ("out", "only", "show")}
        content = {"settings": settings | {"columns": order}, "columns": results}
        write(options.out, "step", f"Training step of {options.model}", content)


if __name__ == "__main__":
    main()
