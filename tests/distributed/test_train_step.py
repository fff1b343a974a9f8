"""The trainer's own step on two processes against one with the whole batch: loss, gradients, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipq.build import build_run
from clipq.dist.env import distributed
from clipq.log.console import Console
from clipq.train.loop import require_finite_weights
from clipq.train.run import DivergedError, Run
from tests.distributed.steps import job_in, losses_of, take_steps, whole_batches
from tests.helpers import colour_shards, run_distributed, tiny_arch

STEPS = 4


def train_on(run: Run) -> dict[str, Any]:
    """A few steps on this rank's part of the batches; also the gradient of the first, which `train_step` clears."""
    gradients: dict[str, torch.Tensor] = {}
    hook = run.state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in run.state.model.named_parameters()})
    )
    first, *others = whole_batches(STEPS)
    steps = take_steps(run, [first])
    hook.remove()
    losses = losses_of(steps + take_steps(run, others))
    weights = {n: p.detach().clone() for n, p in run.state.model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def rank_of_two(folder: str, loss: str) -> None:
    with distributed("cpu") as env:
        run = build_run(
            job_in(Path(folder), f"steps={STEPS}", f"loss={loss}"),
            env,
            Path(folder) / "run",
            "",
            Console(enabled=False),
        )
        drawn = torch.rand(8)
        torch.save({"drawn": drawn, **train_on(run)}, f"{folder}/{env.rank}.pt")
        require_finite_weights(run)
        if env.rank == 1:
            run.state.model.get_parameter("visual.proj").data[0, 0] = float("nan")
        with pytest.raises(DivergedError):  # on both ranks, or one would wait for the other
            require_finite_weights(run)


@pytest.mark.parametrize("loss", ["softmax", "siglip"])
def test_two_processes_equal_one(loss: str, tmp_path: Path) -> None:
    colour_shards(tmp_path, [30, 30])
    tiny_arch(tmp_path)
    run_distributed(rank_of_two, 2, str(tmp_path), loss)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for rank, found in enumerate(ranks):  # what dropout draws from: the seed's own on each rank, never the same
        torch.manual_seed(job_in(tmp_path, f"steps={STEPS}", f"loss={loss}").seed + rank)
        assert torch.equal(found["drawn"], torch.rand(8))
    assert not torch.equal(ranks[0]["drawn"], ranks[1]["drawn"])
    with distributed("cpu") as env:
        run = build_run(
            job_in(tmp_path, f"steps={STEPS}", f"loss={loss}"), env, tmp_path / "run1", "", Console(enabled=False)
        )
        start = {n: p.detach().clone() for n, p in run.state.model.named_parameters()}
        one = train_on(run)

    assert torch.equal(ranks[0]["losses"], ranks[1]["losses"]), "the guard would decide differently"
    torch.testing.assert_close(ranks[0]["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    assert set(one["gradients"]) == set(start)
    for name, expected in one["gradients"].items():
        scale = expected.abs().max()
        assert scale > 0, name
        for rank in ranks:
            assert (rank["gradients"][name] - expected).abs().max() <= 1e-5 * max(scale, 1e-2), name
    for name, expected in one["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        if name.endswith("attn.in_proj.bias"):
            continue  # the key's bias has a gradient of rounding noise alone, which AdamW turns into whole steps
        moved = (expected - start[name]).norm()
        assert (ranks[0]["weights"][name] - expected).norm() <= 1e-2 * moved, name
