"""Low-precision layers sharded by FSDP2: the gradients of one process, from two."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from clipq.lowp import convert_linears, quantized_once
from tests.helpers import run_distributed
from tests.unit.lowp.towers import Counted


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 17))
    convert_linears(layers, "switchback")
    return layers


def compare() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    alone = model()
    # each process quantizes its own rows by themselves, so the two halves are those of one batch
    (sum(alone(half).square().mean() for half in x) / 2).backward()
    sharded = model()
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(sharded)
    sharded(x[rank]).square().mean().backward()
    for one, other in zip(alone.parameters(), sharded.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=1e-5, atol=1e-7)
    # two micro-steps of one optimizer step; the weights are whole, and quantized, in the first forward only
    with quantized_once(sharded), Counted("clipq::quantize_tensor") as counted:
        sharded(x[rank]).square().mean().backward()
        first = counted.calls
        sharded(x[rank]).square().mean().backward()
    assert counted.calls == first > 0
    for one, other in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), 3 * one.grad, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="changed inside of quantized_once"), quantized_once(sharded):
        torch.optim.SGD(sharded.parameters(), lr=0.1).step()
    del sharded, other, one
    gc.collect()  # or threads of gloo outlive the group
    dist.barrier()
    dist.destroy_process_group()


def test_two_sharded_processes_have_the_gradients_of_one() -> None:
    run_distributed(compare, 2)
