"""Low-precision layers sharded by FSDP2: the gradients of one process, from two."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from clipq.lowp import LowpLinear, convert_linears, quantized_once
from clipq.lowp.products import QuantizedWeight
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


def hold() -> None:
    """Weights are held by what computes, compiled too, and whether FSDP keeps them whole or not."""
    dist.init_process_group("gloo")
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    for reshard, compiled in ((False, False), (True, True)):
        torch._dynamo.reset()
        sharded = model()
        layers = [layer for layer in sharded if isinstance(layer, LowpLinear)]
        for layer in layers:
            fully_shard(layer, reshard_after_forward=reshard)
            if compiled:
                layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
        fully_shard(sharded)
        expected = sharded(x).detach()  # with reshard=False the weights now stay whole until a backward
        for _ in range(2):
            with quantized_once(sharded):
                y = sharded(x)
                y.square().mean().backward()
                torch.testing.assert_close(y, expected)
                for layer in layers:
                    assert layer._held is not None
                    layer._held = QuantizedWeight(*(torch.zeros_like(t) for t in layer._held))
                y = sharded(x)
                last = layers[-1].bias
                assert last is not None
                bias = last.full_tensor() if isinstance(last, DTensor) else last
                torch.testing.assert_close(y, bias.detach().expand_as(y))
                y.sum().backward()
            assert all(layer._held is None for layer in layers)
        with pytest.raises(RuntimeError, match="changed inside of quantized_once"), quantized_once(sharded):
            torch.optim.SGD(sharded.parameters(), lr=0.1).step()
        with quantized_once(sharded):  # the weights are shards at the begin and may be whole at the end
            y = sharded(x)
        with quantized_once(sharded):  # and the other way round
            y.sum().backward()
        del sharded, layers, layer, last, bias, y
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def test_what_computes_holds_the_weights() -> None:
    run_distributed(hold, 2)


def test_two_sharded_processes_have_the_gradients_of_one() -> None:
    run_distributed(compare, 2)
