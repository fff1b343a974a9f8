"""One format of checkpoints: what FSDP2 saves loads in one process, in more, and under DDP, and the other way round."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from clipq.dist.env import DistEnv, distributed
from clipq.model.weights import to_openclip
from clipq.optim.shards import whole
from clipq.train.snapshot import Snapshot
from tests.distributed.steps import flat, run_in, take_steps, weights_of, whole_batches
from tests.helpers import colour_shards, run_distributed, tiny_arch

FIRST, ALL = 3, 5
"""Steps before the checkpoint, and with those after it."""
SAVED = {"fsdp": "stable_adamw", "ddp": "adamw"}
"""What saves, each in a run folder of its name, and with which optimizer."""


def settings(saved: str, *parallel: str) -> list[str]:
    return [*parallel, f"optim={SAVED[saved]}", f"steps={ALL}", "data.lanes=4"]


def save(folder: Path, env: DistEnv, saved: str) -> None:
    """Trains and saves; trains on, for what a resumed run is held against."""
    run = run_in(folder, env, saved, *settings(saved, f"parallel={saved}"))
    batches = whole_batches(ALL)
    take_steps(run, batches[:FIRST])
    run.state.step = FIRST
    run.checkpoints.save(run.state, loader=run.loader_info, wait=True)
    here = weights_of(run)
    take_steps(run, batches[FIRST:])
    after = weights_of(run)
    if env.is_main:
        torch.save({"here": here, "after": after}, folder / f"{saved}.pt")
    env.barrier()


def resume(folder: Path, env: DistEnv, saved: str, *parallel: str) -> None:
    """The checkpoint gives the very tensors that it has, and the run goes on as it would have."""
    run = run_in(folder, env, saved, *settings(saved, *parallel))
    assert run.state.step == FIRST
    moments = Snapshot().take(run.state.state_dict()["optimizer"]["state"], keep=env.is_main)
    weights = weights_of(run)
    sharded = any(isinstance(s["exp_avg"], DTensor) for s in run.state.optimizer.state.values())
    assert sharded is ("sdp" in parallel[0])
    if env.is_main:
        expected = torch.load(folder / f"{saved}.pt")
        torch.testing.assert_close(weights, expected["here"], rtol=0, atol=0)
        path = folder / "runs" / saved / "checkpoints" / f"step_{FIRST:08d}"
        on_disk = torch.load(path / "state.pt")["optimizer"]["state"]
        torch.testing.assert_close(moments, on_disk, rtol=0, atol=0)
    take_steps(run, whole_batches(ALL)[FIRST:])
    weights = weights_of(run)
    if env.is_main:
        torch.testing.assert_close(flat(weights), flat(expected["after"]), rtol=0, atol=1e-5)
        assert (flat(weights) - flat(expected["here"])).abs().max() > 1e-3, "nothing moved since"
    del run
    gc.collect()  # or threads of gloo outlive the group
    env.barrier()


def on_two(folder: str) -> None:
    with distributed("cpu") as env:
        for saved in SAVED:
            save(Path(folder), env, saved)
        resume(Path(folder), env, "fsdp", "parallel=ddp")
        resume(Path(folder), env, "ddp", "parallel=fsdp")


def on_four(folder: str) -> None:
    with distributed("cpu") as env:
        resume(Path(folder), env, "fsdp", "parallel=fsdp")
        resume(Path(folder), env, "ddp", "parallel=hsdp", "parallel.replicas=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders that two processes saved, each of which they have resumed by the other strategy."""
    folder = tmp_path_factory.mktemp("sharded")
    colour_shards(folder, [30, 30])
    tiny_arch(folder)
    run_distributed(on_two, 2, str(folder))
    return folder


def test_one_process_goes_on(folder: Path) -> None:
    with distributed("cpu") as env:
        for saved in SAVED:
            resume(folder, env, saved, "parallel=none")


@pytest.mark.slow
def test_four_processes_go_on(folder: Path) -> None:
    run_distributed(on_four, 4, str(folder))


def shapes(value: Any) -> Any:
    """Tensors as their shapes and types, in whatever holds them."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: shapes(v) for key, v in value.items()}
    return [shapes(v) for v in value] if isinstance(value, list | tuple) else type(value)


def test_the_files_do_not_tell_who_saved_them(folder: Path) -> None:
    paths = [folder / "runs" / saved / "checkpoints" / f"step_{FIRST:08d}" for saved in SAVED]
    sharded, whole = (load_file(path / "model.safetensors") for path in paths)
    assert shapes(sharded) == shapes(whole)
    with distributed("cpu") as env:
        own = to_openclip(run_in(folder, env, "new", *settings("ddp", "parallel=none")).state.model)
    assert shapes(whole) == shapes(own)
    sharded, whole = (torch.load(path / "state.pt") for path in paths)
    assert shapes(sharded["optimizer"]["state"]) == shapes(whole["optimizer"]["state"])
    assert sharded.keys() == whole.keys()


def test_what_is_not_sharded_is_not_copied() -> None:
    w = torch.ones(2)
    assert whole(w) is w
