"""StableAdamW on shards: RMS and weights of one process, from two."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from clipq.optim import FixedLossScaler, StableAdamW
from clipq.train.guard import gradient_norms
from tests.helpers import run_distributed

SHAPES = [(5, 3), (1, 4), (7,), (2, 3, 2), (1,)]
"""None divides evenly, and of some a process has nothing."""
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def whole() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g) for s in SHAPES]


def gradient(step: int, i: int) -> torch.Tensor:
    size = 50.0 if step > 4 else 1.0
    return size * torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(100 * step + i))


def shards() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    alone = [nn.Parameter(t) for t in whole()]
    for foreach in (False, True):
        parts = [nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in whole()]
        plain = nn.Parameter(torch.ones(3))  # one that every process has whole
        one, two = StableAdamW(alone, **SETTINGS), StableAdamW([*parts, plain], **SETTINGS, foreach=foreach)
        for p, t in zip(alone, whole(), strict=True):
            p.data.copy_(t)
        largest = 0.0
        for step in range(10):
            for i, (p, q) in enumerate(zip(alone, parts, strict=True)):
                p.grad = gradient(step, i)
                q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
            plain.grad = torch.ones(3)
            one.step()
            two.step()
            assert two.rms[plain] == pytest.approx(1, abs=1e-5), "not summed over processes"
            for p, q in zip(alone, parts, strict=True):
                assert isinstance(q, DTensor)
                torch.testing.assert_close(two.rms[q], one.rms[p], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-6, atol=1e-6)
                largest = max(largest, one.rms[p].item())
        assert largest > 2, "nothing was clipped"
    dist.destroy_process_group()


def fsdp() -> None:
    dist.init_process_group("gloo")

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))

    alone, sharded = model(), model()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer)
    one, two = (StableAdamW(m.parameters(), **SETTINGS) for m in (alone, sharded))
    for step in range(8):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)) * (1 if step < 5 else 40)
        for m, optimizer in ((alone, one), (sharded, two)):
            m(x).square().mean().backward()  # the same batch everywhere: the mean over processes is its gradient
            optimizer.step()
        if step == 6:
            expected, found = (gradient_norms([*m.parameters()]) for m in (alone, sharded))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
            assert expected.min() > 0
        for optimizer in (one, two):
            optimizer.zero_grad()
    for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)  # pyright: ignore
        torch.testing.assert_close(two.rms[q], one.rms[p], rtol=1e-4, atol=1e-6)
    again = StableAdamW(sharded.parameters())
    again.load_state_dict(two.state_dict())
    for q in sharded.parameters():
        assert isinstance(again.state[q]["exp_avg"], DTensor)
        assert torch.equal(again.state[q]["exp_avg"].to_local(), two.state[q]["exp_avg"].to_local())
    del sharded, two, again, q, m, optimizer
    gc.collect()  # or threads of gloo outlive the group
    dist.barrier()
    dist.destroy_process_group()


def partial_gradients() -> None:
    """Tensor parallelism without FSDP leaves the gradients of what every process has whole as unfinished sums."""
    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    alone = nn.Parameter(whole()[0])
    copy = nn.Parameter(distribute_tensor(alone.detach().clone(), mesh, [Replicate()]))
    one, two = StableAdamW([alone], **SETTINGS), StableAdamW([copy], **SETTINGS)
    scaler = FixedLossScaler([("copy", copy)], 1.0)
    for step in range(3):
        alone.grad = gradient(step, 0)
        part = gradient(step, 0).flip(0)  # another in each element: a mere factor would not change a step
        copy.grad = DTensor.from_local(part if rank == 0 else alone.grad - part, mesh, [Partial()])
        one.step()
        scaler.step(two)
        scaler.update()
        torch.testing.assert_close(copy.to_local(), alone.detach(), rtol=1e-6, atol=1e-6)  # pyright: ignore
    dist.destroy_process_group()


def fsdp_over_tensor_parallelism() -> None:
    """Both divide the rows of the first layer: its RMS is a sum over both dimensions of the mesh."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))

    alone, sharded = model(), model()
    parallelize_module(sharded, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(sharded, mesh=mesh["data"])
    one, two = (StableAdamW(m.parameters(), **SETTINGS) for m in (alone, sharded))
    for step in range(6):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)) * (1 if step < 4 else 40)
        for m, optimizer in ((alone, one), (sharded, two)):
            m(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(two.rms[q], one.rms[p], rtol=1e-4, atol=1e-6)
    for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)  # pyright: ignore
    del sharded, two, q, m, optimizer
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_processes_are_one() -> None:
    run_distributed(fsdp_over_tensor_parallelism, 4)


@pytest.mark.parametrize("function", [shards, fsdp, partial_gradients])
def test_two_processes_are_one(function) -> None:
    run_distributed(function, 2)
