"""Time and memory of the contrastive loss, forward and backward, on one device: whole matrices of logits as it had them
at first, beside tiles.

bench_loss.py --out docs/benchmarks/loss_h100.json
bench_loss.py --pairs 64 512 --width 128 --out /tmp/loss.json        # on a CPU, to try it

Random features of length 1, fp32. Tiles need four products of pairs × pairs × width, one of them for the recomputation;
whole matrices need six, and one more for the largest logit.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import free_memory, kernels, median, wall_milliseconds, write
from torch import Tensor

from clipq.loss.contrastive import contrastive_loss

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def whole(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of clipq before tiles, and what the loop added to it."""
    own = torch.arange(len(image_BD), device=image_BD.device)
    images, texts = scale * image_BD @ text_BD.T, scale * text_BD @ image_BD.T
    loss = (F.cross_entropy(images, own) + F.cross_entropy(texts, own)) / 2
    with torch.no_grad():
        return loss, scale * (image_BD @ text_BD.T).amax()


def columns(exponents: list[int]) -> dict[str, Loss]:
    tiled = {f"tiles of 2^{n}": functools.partial(contrastive_loss, tile=2**n) for n in exponents}
    return {"whole matrices": whole} | tiled


def milliseconds(step: Callable[[], Any], steps: int) -> list[float]:
    if DEVICE.type == "cuda":
        return wall_milliseconds(step, warmup=2, steps=steps)
    times = []
    for _ in range(2 + steps):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


def measure(loss: Loss, pairs: int, width: int, steps: int) -> dict[str, Any]:
    """Milliseconds of forward and backward; memory at the peak beyond features and their gradients, on a GPU."""
    on_gpu = DEVICE.type == "cuda"
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(pairs, width, device=DEVICE), dim=1).requires_grad_() for _ in range(2)]
    leaves.append(torch.tensor(1 / 0.07, device=DEVICE, requires_grad=True))
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    def step() -> Tensor:
        value, _ = loss(*leaves)
        value.backward()
        return value.detach()

    result: dict[str, Any] = {"loss": step().item()}
    if on_gpu:
        free_memory()
        before = torch.cuda.memory_allocated()
        step()
        result["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = milliseconds(step, steps)
    result |= {"ms": median(times), "ms_min": min(times), "ms_max": max(times)}
    if on_gpu:
        ran = kernels(step)
        result |= {"launches": sum(k["count"] for k in ran.values()), "kernels": dict(list(ran.items())[:6])}
        result["gpu_ms"] = sum(k["ms"] for k in ran.values())
    return result


def product_speed(width: int) -> float:
    """fp32 operations a second of one large product of matrices."""
    n = 8192 if DEVICE.type == "cuda" else 1024
    x, y = torch.randn(n, width, device=DEVICE), torch.randn(width, n, device=DEVICE)
    return 2 * n * n * width / (median(milliseconds(lambda: x @ y, 10)) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[256, 1024, 4096, 16384, 65536])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tiles", type=int, nargs="+", default=[20, 22, 24, 26], help="logits in a tile: 2^n")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    speed = product_speed(options.width)
    results: dict[str, Any] = {"width": options.width, "fp32_tflops": speed / 1e12, "pairs": {}}
    for pairs in options.pairs:
        products = 1e3 * 4 * 2 * pairs**2 * options.width / speed
        print(f"{pairs} pairs × {options.width}: four products take {products:.2f} ms at {speed / 1e12:.1f} TFLOP/s")
        found: dict[str, Any] = {}
        for title, loss in columns(options.tiles).items():
            if DEVICE.type == "cuda":
                free_memory()
            try:
                found[title] = measure(loss, pairs, options.width, options.steps)
            except torch.OutOfMemoryError:
                found[title] = None
                print(f"  {title:16} out of memory")
                continue
            memory = found[title].get("extra_mib")
            told = "" if memory is None else f", {memory:.0f} MiB, {found[title]['launches']} launches"
            print(f"  {title:16} {found[title]['ms']:9.2f} ms{told}, loss {found[title]['loss']:.6f}")
        results["pairs"][str(pairs)] = {"products_ms": products, "columns": found}
    write(options.out, "loss", "Contrastive loss", results)


if __name__ == "__main__":
    main()
