"""Who this process is among the processes of a run, in one immutable object."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class DistEnv:
    """Rank, number of processes and device of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None = None  # pyright: ignore[reportPrivateImportUsage]
    """What the ranks know without a collective."""
    timeout: timedelta = timedelta(minutes=30)
    """After which a collective fails."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()

    def broadcast_flag(self, flag: bool) -> bool:
        """Rank 0's `flag`, on every rank: for decisions that depend on a clock or a file system."""
        if not self.is_distributed:
            return flag
        tensor = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(tensor, src=0)
        return bool(tensor.item())

    def tell_why(self, why: str) -> None:
        """Leaves word of why this rank ends, for those that find it gone in the midst of a collective."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.compare_set(_WHY, "", f"rank {self.rank}: {why}")  # the first rank has caused the others

    def why(self) -> str | None:
        """Which rank was the first to end, and why; None where none has said so."""
        if self.store is None:
            return None
        try:
            return self.store.get(_WHY).decode() if self.store.check([_WHY]) else None
        except RuntimeError:  # without torchrun the store is rank 0's
            return "rank 0 is gone; its log says why"


_WHY = "clipq/why"


def world_size_from_environment() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size_from_environment() -> int:
    """Number of processes that torchrun started on this node; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size_from_environment())))


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def distributed(device: str = "auto", *, timeout_minutes: float = 30.0) -> Iterator[DistEnv]:
    """Joins the process group that torchrun's environment variables describe, and leaves it at the end.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        timeout_minutes: a collective that takes longer ends the run.
    """
    rank, local_rank = (int(os.environ.get(k, "0")) for k in ("RANK", "LOCAL_RANK"))
    world_size = world_size_from_environment()
    local_world_size = local_world_size_from_environment()
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible, "
                f"{local_world_size} processes on this node; lower --nproc_per_node"
            )
        torch.cuda.set_device(local_rank)
    timeout, store = timedelta(minutes=timeout_minutes), None
    if world_size > 1:
        meet = dist.rendezvous("env://", rank, world_size, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
        store, _, _ = next(meet)
        store.set_timeout(timeout)
    env = DistEnv(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"),
        store=store,
        timeout=timeout,
    )
    if store is None:
        yield env
        return
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=dist.PrefixStore("group", store),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=env.device if use_cuda else None,
    )
    try:
        yield env
    finally:
        dist.destroy_process_group()
