"""Two gloo processes with half of a batch each against one with all of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from clipq.dist.env import distributed
from clipq.lowp import convert_linears, quantized_once
from tests.helpers import run_distributed
from tests.unit.lowp.towers import block_of, tokens

RECIPE = "switchback_m"


def weights_of_loss(batch: int) -> torch.Tensor:
    return torch.randn(batch, 7, 32, generator=torch.Generator().manual_seed(3))


def gradients_of_rank(folder: str) -> None:
    with distributed("cpu") as env:
        work = Path(folder) / str(env.rank)
        work.mkdir()
        block = block_of(work)
        convert_linears(block, RECIPE)
        wrapped = DistributedDataParallel(block, gradient_as_bucket_view=True)
        rows = slice(env.rank * 3, env.rank * 3 + 3)
        with quantized_once(block):
            with wrapped.no_sync():
                (wrapped(tokens(6)[rows]) * weights_of_loss(6)[rows]).sum().backward()
            (wrapped(tokens(6)[rows]) * weights_of_loss(6)[rows]).sum().backward()
        torch.save({n: p.grad for n, p in block.named_parameters()}, work / "gradients.pt")


def test_gradients_are_those_of_one_process(tmp_path) -> None:
    run_distributed(gradients_of_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / str(r) / "gradients.pt") for r in range(2))
    block = block_of(tmp_path)
    convert_linears(block, RECIPE)
    (block(tokens(6)) * weights_of_loss(6)).sum().backward()
    for name, p in block.named_parameters():
        assert torch.equal(first[name], second[name]), name
        if name == "attn.in_proj.bias":
            continue  # the keys' part is noise
        # rows are quantized for themselves: only the order of sums differs (mean of two ranks, two micro-steps)
        off = (first[name] - p.grad).norm() / p.grad.norm()
        assert off < 1e-4, f"{name}: {off:.3g}"
