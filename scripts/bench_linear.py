"""Time of each operation inside one linear layer, forward and backward, in bf16 and by a recipe; and of a block's
layers.

bench_linear.py --out docs/benchmarks/linear_h100.json

The operations are the paper's figure 3. "alone" is a layer by itself, compiled, everything included: quantization of
inputs, weights and gradients, three products, the gradient of the bias. "block" is what a block has besides
attention: norm and query-key-value projection, output projection with residual, norm and MLP with residual.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench_common import free_memory, write
from torch import nn

from clipq import kernels
from clipq.lowp import convert_linears, get_recipe
from clipq.lowp.measure import BF16, block_milliseconds, milliseconds, training_call

LAYERS = {  # of ViT-H/14: inputs, outputs
    "attn.in_proj": (1280, 3840),
    "attn.out_proj": (1280, 1280),
    "mlp.c_fc": (1280, 5120),
    "mlp.c_proj": (5120, 1280),
}


def operations(
    tokens: int, n: int, m: int, recipe: str, device: str = "cuda", timer: Callable[..., float] = milliseconds
) -> dict[str, float]:
    """Milliseconds of each operation of a SwitchBack layer, and of the three bf16 products."""
    r = get_recipe(recipe)
    assert r.output is not None
    assert r.grad_input is not None
    forward, backward = r.output.left.dtype, r.grad_input.left.dtype
    x = torch.randn(tokens, n, device=device, dtype=BF16)
    g = torch.randn(tokens, m, device=device, dtype=BF16)
    weight = torch.randn(m, n, device=device) / n**0.5
    w16, bias, bias16 = weight.to(BF16), torch.randn(m, device=device), torch.randn(m, device=device, dtype=BF16)
    x_q, x_s, _ = kernels.quantize_rows(x, forward)
    g_q, g_s, _ = kernels.quantize_rows(g, backward)
    w_q, w_qt, w_s = kernels.quantize_tensor(weight, forward)
    calls: dict[str, Callable[[], Any]] = {
        "bf16 output": lambda: torch.addmm(bias16, x, w16.T),
        "bf16 input gradient": lambda: g @ w16,
        "bf16 weight gradient": lambda: kernels.matmul16(g.T, x),
        "bf16 bias gradient": lambda: g.sum(0, dtype=torch.float32),
        "quantize X": lambda: kernels.quantize_rows(x, forward),
        "quantize W": lambda: kernels.quantize_tensor(weight, forward),
        "output": lambda: kernels.matmul(x_q, w_q, x_s, w_s, bias=bias, out_dtype=BF16),
        "quantize G and sum for the bias": lambda: kernels.quantize_rows(g, backward, column_sums=True),
        "input gradient": lambda: kernels.matmul(g_q, w_qt, g_s, w_s, out_dtype=BF16),
    }
    return {name: timer(call) for name, call in calls.items()}


def alone(tokens: int, n: int, m: int, recipe: str) -> dict[str, float]:
    """Milliseconds of forward and backward of one compiled layer."""
    x = torch.randn(tokens, n, device="cuda", dtype=BF16, requires_grad=True)
    times = {}
    for name in ("bf16", recipe):
        free_memory()
        layer = nn.Sequential(nn.Linear(n, m, device="cuda"))
        convert_linears(layer, name)
        compiled = torch.compile(layer, fullgraph=True)
        times[name] = milliseconds(training_call(compiled, [*layer.parameters()], x))
    return times | {"ratio": times["bf16"] / times[recipe]}


def block(tokens: int, width: int, recipe: str) -> dict[str, float]:
    """Milliseconds of forward and backward of a block's layers with what feeds them, compiled."""
    times = {name: block_milliseconds(name, width, 4 * width, tokens) for name in ("bf16", recipe)}
    return times | {"ratio": times["bf16"] / times[recipe]}


def _line(row: dict[str, float], recipe: str) -> str:
    return f"bf16 {row['bf16']:.3f} ms, {recipe} {row[recipe]:.3f} ms, ×{row['ratio']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="switchback", choices=("switchback", "switchback_fp8"))
    parser.add_argument("--tokens", type=int, default=33024)
    parser.add_argument("--out", required=True, help="JSON file")
    options = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {"recipe": options.recipe, "tokens": options.tokens, "operations": {}, "alone": {}}
    for name, (n, m) in LAYERS.items():
        results["operations"][name] = times = operations(options.tokens, n, m, options.recipe)
        results["alone"][name] = row = alone(options.tokens, n, m, options.recipe)
        print(f"{name} alone: {_line(row, options.recipe)}")
        print("   ", ", ".join(f"{k} {v:.3f}" for k, v in times.items()), flush=True)
    results["block"] = row = block(options.tokens, 1280, options.recipe)
    print(f"block: {_line(row, options.recipe)}")
    write(options.out, "linear", "One linear layer, and the layers of a block", results)


if __name__ == "__main__":
    main()
