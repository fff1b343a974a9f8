"""Low-precision products and quantizers against cuBLAS bf16 and the device's copy bandwidth.

bench_gemm.py --out docs/benchmarks/gemm_h100.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench_common import copy_bandwidth, write
from torch import Tensor

from clipq import kernels
from clipq.lowp.measure import milliseconds

SHAPES = [  # tokens, inner dimension, outputs
    *((33024, 1280, n) for n in (1280, 3840, 5120)),
    *((33024, 5120, n) for n in (1280, 3840, 5120)),
    (33024, 3840, 1280),
    (19712, 1024, 1024),
    (19712, 1024, 4096),
    (19712, 4096, 1024),
    (50432, 768, 3072),
    (50432, 3072, 768),
    (8192, 8192, 8192),
]
WIDTHS = (768, 1024, 1280, 3072, 4096, 5120)
TOKENS = 33024


def products(M: int, K: int, N: int) -> dict[str, float]:
    """TFLOP/s of a product with bias, bf16 before and after the others; relative error to float64 on some rows."""
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / K**0.5
    bias = torch.randn(N, device="cuda")
    bias16 = bias.bfloat16()
    exact = x[:256].double() @ w.double().T + bias.double()
    rate = 2 * M * N * K / 1e9
    row: dict[str, float] = {"bf16": rate / milliseconds(lambda: torch.addmm(bias16, x, w.T))}
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        (a, a_scale, _), (b, _, b_scale) = kernels.quantize_rows(x, dtype), kernels.quantize_tensor(w, dtype)

        def run(a: Tensor = a, b: Tensor = b, a_scale: Tensor = a_scale, b_scale: Tensor = b_scale) -> Tensor:
            return kernels.matmul(a, b, a_scale, b_scale, bias=bias, out_dtype=torch.bfloat16)

        row[f"{name}_error"] = ((run()[:256].double() - exact).norm() / exact.norm()).item()
        row[name] = rate / milliseconds(run)
        residual = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        row[f"{name}_residual"] = rate / milliseconds(
            lambda a=a, b=b, a_scale=a_scale, b_scale=b_scale, residual=residual: kernels.matmul(
                a, b, a_scale, b_scale, bias=bias, residual=residual, out_dtype=torch.bfloat16
            )
        )
    row["bf16_again"] = rate / milliseconds(lambda: torch.addmm(bias16, x, w.T))
    base = (row["bf16"] + row["bf16_again"]) / 2
    row |= {f"{name}_ratio": row[name] / base for name in ("int8", "fp8")}
    return row


def producers(K: int, copy: float) -> dict[str, float]:
    """Share of the copy bandwidth that each kernel over rows reaches, counting the bytes that it must move."""
    x = torch.randn(TOKENS, K, device="cuda", dtype=torch.bfloat16)
    dy, residual = torch.randn_like(x), torch.randn_like(x)
    w, b = torch.randn(K, device="cuda"), torch.randn(K, device="cuda")
    int8, bf16 = torch.int8, torch.bfloat16
    _, q, scale, mean, rstd = kernels.layer_norm_quantize(x, w, b, 1e-5, out_dtype=bf16, dtype=int8, keep=False)
    calls: dict[str, tuple[int, Callable[[], Any]]] = {  # bytes for each element, call
        "quantize_rows": (3, lambda: kernels.quantize_rows(x, int8)),
        "quantize_rows + column sums": (3, lambda: kernels.quantize_rows(x, int8, column_sums=True)),
        "layer_norm_quantize": (
            5,
            lambda: kernels.layer_norm_quantize(x, w, b, 1e-5, out_dtype=bf16, dtype=int8, keep=True),
        ),
        "layer_norm_backward": (8, lambda: kernels.layer_norm_backward(dy, x, w, mean, rstd, residual)),
        "gelu_quantize": (5, lambda: kernels.gelu_quantize(x, quick=False, dtype=int8, keep=True)),
        "gelu_backward_quantize": (7, lambda: kernels.gelu_backward_quantize(dy, x, quick=False, dtype=int8)),
        "dequantize_rows": (3, lambda: kernels.dequantize_rows(q, scale, bf16)),
        # read twice: a column's scale is known at its end, and the L2 cache does not hold the matrix until then
        "quantize_columns": (5, lambda: kernels.quantize_columns(x, int8)),
    }
    shares = {}
    for name, (size, call) in calls.items():
        if name.startswith("layer_norm") and K > 1280:
            continue
        shares[name] = size * TOKENS * K / (milliseconds(call) / 1e3) / copy
    weight = torch.randn(K, 1280, device="cuda")
    shares["quantize_tensor (float32 weight)"] = (
        6 * weight.numel() / (milliseconds(lambda: kernels.quantize_tensor(weight, int8)) / 1e3) / copy
    )
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_bandwidth()
    results: dict[str, Any] = {"copy_bytes_per_second": copy, "products": {}, "producers": {}}
    print(f"{'M × K × N':22} {'bf16':>6} {'int8':>6} {'ratio':>6} {'+res':>6} {'fp8':>6} {'ratio':>6} {'error':>7}")
    for M, K, N in SHAPES:
        row = products(M, K, N)
        results["products"][f"{M}x{K}x{N}"] = row
        print(
            f"{M} × {K} × {N}".ljust(22),
            f"{row['bf16']:6.0f} {row['int8']:6.0f} {row['int8_ratio']:6.2f} {row['int8_residual']:6.0f}",
            f"{row['fp8']:6.0f} {row['fp8_ratio']:6.2f} {row['int8_error']:7.4f}",
        )
    for K in WIDTHS:
        shares = producers(K, copy)
        results["producers"][str(K)] = shares
        print(f"K={K}: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
    write(options.out, "gemm", "Products and quantizers", results)


if __name__ == "__main__":
    main()
