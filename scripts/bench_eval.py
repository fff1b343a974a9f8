"""Images a second of an evaluation's encoder, for each recipe, beside compiled bf16; and what it costs in features.

bench_eval.py --model ViT-H-14 --out eval_vit_h.json

Random images lie on the device; weights are random too. Each recipe is measured in a process of its own, bf16 first.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import alone, kernels, median, wall_milliseconds, write

from clipq.build import build_model
from clipq.build_backend import compile_blocks, convert
from clipq.build_eval import build_encoder
from clipq.config.choices import Precision, Recipe, Switch
from clipq.config.evaluation import EvalConfig
from clipq.config.groups import BackendConfig, ModelConfig
from clipq.dist.env import distributed
from clipq.log.console import Console

BACKENDS = ("bf16", "switchback", "switchback_q", "switchback_fp8", "fp8")


def measure(options: argparse.Namespace, backend: str) -> dict[str, Any]:
    with distributed("cuda") as env:
        torch.manual_seed(0)
        clip = build_model(ModelConfig(name=options.model))
        clip.model.to(env.device)
        images = torch.randn(options.batch, 3, *clip.preprocess.size, device=env.device)
        exact = build_encoder(clip, BackendConfig(precision=Precision.fp32), EvalConfig(), env, Console(enabled=False))
        with exact.evaluating():
            expected = exact.images(images[:16])
        config = BackendConfig(precision=Precision.bf16, recipe=Recipe(backend), compile=Switch.on)
        convert(clip, config, pairs=options.batch, training=False)
        compile_blocks(clip.model, config, env)
        encoder = replace(build_encoder(clip, config, EvalConfig(), env, Console(enabled=False)), compiled=True)
        with encoder.evaluating():
            times = wall_milliseconds(lambda: encoder.images(images), warmup=5, steps=options.steps)
            ran = kernels(lambda: encoder.images(images))
            cosine = F.cosine_similarity(encoder.images(images)[:16], expected).mean().item()
    shown = dict(list(ran.items())[: options.kernels])
    ms = median(times)
    return {
        "ms": ms,
        "images_per_second": 1e3 * options.batch / ms,
        "gpu_ms": sum(k["ms"] for k in ran.values()),
        "cosine_to_fp32": cosine,
        "kernels": shown,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-H-14", help="an OpenCLIP name")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=12, help="kernels listed in the JSON, longest first")
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        Path(options.out).write_text(json.dumps(measure(options, options.only)))
        return
    results: dict[str, Any] = {"model": options.model, "batch": options.batch, "backends": {}}
    for backend in options.backends:
        row = results["backends"][backend] = alone(__file__, backend)
        if "error" in row:
            raise SystemExit(f"{backend} does not run: {row['error']}")
        base = results["backends"][options.backends[0]]
        print(
            f"{backend:16} {row['images_per_second']:7.0f} img/s  × {base['ms'] / row['ms']:.3f}  kernels alone",
            f"× {base['gpu_ms'] / row['gpu_ms']:.3f}  cosine to fp32 {row['cosine_to_fp32']:.6f}",
            flush=True,
        )
        write(options.out, "eval", f"Evaluation of {options.model}", results)


if __name__ == "__main__":
    main()
