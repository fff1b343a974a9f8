"""What a run does besides steps, in shards: evaluating, refusing updates, checking weights, measuring low precision."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch

from clipq.dist.env import DistEnv, distributed
from clipq.optim.shards import local
from clipq.train.loop import require_finite_weights
from clipq.train.run import DivergedError, Run
from clipq.watch.quantization import quantization_errors
from tests.distributed.steps import run_in, take_steps, weights_of, whole_batches
from tests.helpers import colour_shards, run_distributed, tiny_arch

SETTINGS = ("backend=switchback", "backend.precision=fp32", "steps=4")
SHARDED = [("parallel=fsdp",), ("parallel=fsdp", "parallel.reshard_after_forward=false")]


def features(run: Run, rank: int) -> dict[str, torch.Tensor]:
    """Of some images and texts; the first rank has more of them."""
    image = run.normalize(whole_batches(1)[0]["image"])
    with run.encoder.evaluating():
        return {
            "image": torch.cat([run.encoder.images(image[n : n + 3]) for n in range(0, 9 if rank == 0 else 3, 3)]),
            "text": run.encoder.texts([f"a text {n}" for n in range(5 if rank == 0 else 2)]),
        }


def evaluate_with_all_images_on_one(run: Run) -> None:
    """As of a small set on many ranks: what the others used last is another tower, when the next step begins."""
    with run.encoder.evaluating():
        run.encoder.texts(["a text"])
        if run.env.is_main:
            run.encoder.images(run.normalize(whole_batches(1)[0]["image"]))


def errors(run: Run) -> dict[str, float]:
    batch = whole_batches(1)[0]
    return quantization_errors(run.state.model, run.normalize(batch["image"]), batch["text"])


def assert_no_update_where_bad(run: Run) -> None:
    before = weights_of(run)
    (bad,) = take_steps(run, whole_batches(2)[:1])
    assert not bad.numbers[-1]
    moved = weights_of(run)
    run.guard.bound = -math.inf
    (bad,) = take_steps(run, whole_batches(2)[1:])
    run.guard.bound = math.inf
    assert bad.numbers[-1]
    after = weights_of(run)
    if run.env.is_main:
        assert any(not torch.equal(before[name], t) for name, t in moved.items())
        torch.testing.assert_close(after, moved, rtol=0, atol=0)


def assert_all_hear_of_bad_weights(run: Run, name: str) -> None:
    require_finite_weights(run)
    weight = local(run.state.model.get_parameter(name))
    if run.env.rank == 1:
        weight.data[0, 0] = math.nan
    with pytest.raises(DivergedError):  # on both ranks, or one would wait for the other
        require_finite_weights(run)


def try_all(folder: Path, env: DistEnv, name: str, parallel: tuple[str, ...], optimizer: str) -> None:
    run = run_in(folder, env, name, *SETTINGS, *parallel, f"optim={optimizer}")
    first = features(run, env.rank)  # before any step, as a resumed run may
    take_steps(run, whole_batches(1))
    again = features(run, env.rank)
    expected = torch.load(folder / f"{optimizer}.pt")
    for found, which in ((first, "first"), (again, "again")):
        for tower, value in found.items():
            torch.testing.assert_close(value, expected[which][tower][: len(value)], rtol=1e-5, atol=1e-5)
    # a value that rounds the other way moves an error by half a per cent; the weights' part of it is a third
    assert errors(run) == pytest.approx(expected["errors"], rel=2e-2)
    evaluate_with_all_images_on_one(run)
    assert_no_update_where_bad(run)
    assert_all_hear_of_bad_weights(run, "visual.transformer.resblocks.0.mlp.c_fc.weight")
    del run
    gc.collect()  # or threads of gloo outlive the group
    env.barrier()


def assert_forwards_leave_no_hooks(folder: Path, env: DistEnv) -> None:
    run = run_in(folder, env, "bias", "loss=siglip", "parallel=fsdp", "steps=4")
    take_steps(run, whole_batches(2))
    hooks = run.state.model.get_parameter("logit_bias")._backward_hooks
    assert not hooks, "a step would take longer than the one before"


def on_rank(folder: str) -> None:
    with distributed("cpu") as env:
        for number, (parallel, optimizer) in enumerate(zip(SHARDED, ("adamw", "stable_adamw"), strict=True)):
            try_all(Path(folder), env, str(number), parallel, optimizer)
        assert_forwards_leave_no_hooks(Path(folder), env)


def test_two_processes_in_shards_do_as_one(tmp_path: Path) -> None:
    colour_shards(tmp_path, [30, 30])
    tiny_arch(tmp_path)
    for optimizer in ("adamw", "stable_adamw"):
        with distributed("cpu") as env:
            run = run_in(tmp_path, env, optimizer, *SETTINGS, "parallel=none", f"optim={optimizer}")
            found = {"first": features(run, 0)}
            take_steps(run, whole_batches(1))
            torch.save(found | {"again": features(run, 0), "errors": errors(run)}, tmp_path / f"{optimizer}.pt")
    run_distributed(on_rank, 2, str(tmp_path))
