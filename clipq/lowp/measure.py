"""Measures where low precision pays on this machine's GPU.

python -m clipq.lowp.measure my_gpu.json            # some minutes; then clipq-train backend.skip=my_gpu.json

Forward and backward of what a residual block has besides attention, in compiled bf16 and by each recipe, as CUDA
graphs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipq.kernels import implementation
from clipq.lowp.convert import convert_linears
from clipq.lowp.fused import norm_mlp, norm_projections
from clipq.lowp.linear import LowpLinear
from clipq.lowp.recipe import RECIPES
from clipq.lowp.speed import Speed, SpeedTable

BF16 = torch.bfloat16
WIDTHS = (384, 512, 768, 1024, 1280, 1664)
TOKENS = (4096, 16384, 65536)
MEASURED = [r.name for r in RECIPES.values() if r.output is not None and not r.simulated]


def milliseconds(f: Callable[[], Any], *, warmup: float = 25, rep: float = 100) -> float:
    """Median GPU time of a call, with the L2 cache flushed between calls.

    The call is recorded as a CUDA graph: launched one by one, a kernel of 50 µs would be timed with its launch.
    """
    from triton.testing import do_bench

    for _ in range(2):
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    time = do_bench(graph.replay, warmup=warmup, rep=rep, return_mode="median")  # pyright: ignore[reportArgumentType]
    graph.reset()
    return time  # pyright: ignore[reportReturnType]


def training_call(module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> Callable[[], None]:
    """Forward and backward under autocast, gradients written anew, as a call to be timed."""
    with torch.autocast(x.device.type, dtype=BF16):
        g = torch.randn_like(module(x))

    def call() -> None:
        for p in (x, *parameters):
            p.grad = None
        with torch.autocast(x.device.type, dtype=BF16):
            y = module(x)
        y.backward(g)

    return call


class BlockLinears(nn.Module):
    """A block without its attention: the middle third of the projection stands in for what attention would give."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.c_fc, LowpLinear) and self.c_fc.recipe.fusable:
            _, mixed, _, x = norm_projections(x, self.ln_1, self.in_proj)  # pyright: ignore[reportArgumentType]
            x = self.out_proj(mixed, residual=x)
            return norm_mlp(x, self.ln_2, self.c_fc, self.c_proj, quick=False, add=True)  # pyright: ignore
        mixed = self.in_proj(self.ln_1(x).to(x.dtype)).chunk(3, -1)[1]
        x = x + self.out_proj(mixed)
        return x + self.c_proj(nn.functional.gelu(self.c_fc(self.ln_2(x).to(x.dtype))))


def block_milliseconds(recipe: str, width: int, hidden: int, tokens: int, **timing: float) -> float:
    """Forward and backward of a block's layers with what feeds them, compiled, on random tokens."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    x = torch.randn(tokens, width, device="cuda", dtype=BF16, requires_grad=True)
    module = BlockLinears(width, hidden).cuda()
    convert_linears(module, recipe)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    return milliseconds(training_call(compiled, [*module.parameters()], x), **timing)


def computable(device: str) -> list[str]:
    """The recipes whose types a device multiplies; says which are left out."""
    found = []
    for name in MEASURED:
        try:
            for dtype in RECIPES[name].dtypes:
                implementation(device, dtype)
            found.append(name)
        except RuntimeError as error:
            print(f"{name} is left out: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file")
    parser.add_argument("--recipes", nargs="+", choices=MEASURED, help="default: all that the GPU can compute")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to measure")
    recipes, speeds = options.recipes or computable("cuda"), []
    for width in options.widths:
        for tokens in options.tokens:
            bf16 = block_milliseconds("bf16", width, 4 * width, tokens, rep=50)
            line = [f"width {width}, {tokens:,} tokens: bf16 {bf16:.3f} ms"]
            for recipe in recipes:
                ratio = bf16 / block_milliseconds(recipe, width, 4 * width, tokens, rep=50)
                speeds.append(Speed(recipe, width, 4 * width, tokens, round(ratio, 3)))
                line.append(f"{recipe} ×{ratio:.2f}")
            print(", ".join(line), flush=True)
            SpeedTable(torch.cuda.get_device_name(), tuple(speeds)).write(options.out)
    print(f"wrote {options.out}: clipq-train backend.skip={options.out}")


if __name__ == "__main__":
    main()
