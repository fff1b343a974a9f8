"""What a refused step must leave as it was besides the weights, and what a loss scale may not hide."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipq.config.checks import ConfigError
from clipq.dist.env import distributed
from clipq.optim import FixedLossScaler
from clipq.train import events as reading
from clipq.train.loop import train
from clipq.train.run import DivergedError, Run
from tests.helpers import read_metrics, run_distributed
from tests.unit.train import runs


def run_of(arch: Path, shards: list[str], *overrides: str, folder: str = "run") -> Run:
    with distributed("cpu") as env:
        return runs.run_of(arch, shards, *overrides, env=env, folder=Path(folder))


def nan_images(run: Run, *steps: int) -> None:
    """Batches of these steps come to the model as NaN."""
    run.state.model.get_submodule("visual").register_forward_pre_hook(
        lambda _, inputs: tuple(x * math.nan for x in inputs) if run.state.step + 1 in steps else None
    )


def test_statistics_of_batch_norms_do_not_keep_a_refused_step(tmp_path: Path, shards: list[str]) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "resnet.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    run = run_of(tmp_path / "resnet.json", shards, "guard.policy=skip")
    nan_images(run, 3)
    (mean,) = (b for n, b in run.state.model.named_buffers() if n == "visual.bn1.running_mean")
    seen: list[Tensor] = []
    run.state.model.register_forward_pre_hook(lambda *_: seen.append(mean.clone()))
    train(run)
    assert torch.equal(seen[2], seen[3]), "the third step left nothing"
    assert not torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[3], seen[4])
    assert all(b.isfinite().all() for n, b in run.state.model.named_buffers() if "running" in n)


def test_statistics_that_are_not_finite_are_not_saved(tmp_path: Path, shards: list[str]) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "resnet.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    run = run_of(tmp_path / "resnet.json", shards, "steps=2", "schedule.warmup=1")
    (mean,) = (b for n, b in run.state.model.named_buffers() if n == "visual.bn1.running_mean")
    run.state.optimizer.register_step_post_hook(lambda *_: mean.fill_(math.nan))
    with pytest.raises(DivergedError, match="the weights are not finite after step 2"):
        train(run)


def with_dynamic_scale(run: Run) -> Run:
    """As backend=fp16 has it on a GPU."""
    run.state.scaler = torch.amp.GradScaler("cpu")
    run.guard._scaling = True
    return run


def nan_gradients(run: Run, first: int, last: int) -> None:
    weight = run.state.model.get_parameter("visual.proj")
    weight.register_hook(lambda g: g * math.nan if first <= run.state.step + 1 <= last else None)


def test_steps_that_a_dynamic_scale_leaves_out_are_told(arch: Path, shards: list[str]) -> None:
    run = with_dynamic_scale(run_of(arch, shards))
    nan_gradients(run, 2, 3)
    train(run)
    found = read_metrics(Path("run"), "event")
    assert [(e["event"], e["step"]) for e in found] == [("gradient overflow", 2), ("gradient overflow", 3)]
    assert found[0]["parameters"] == ["visual.proj"]


def test_a_dynamic_scale_that_leaves_out_every_step_ends_the_run(
    arch: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_OVERFLOWS", 4)
    run = with_dynamic_scale(run_of(arch, shards, "steps=12"))
    nan_gradients(run, 3, 99)
    with pytest.raises(
        DivergedError, match="not finite in each of the last 4 steps, to step 6, whatever the loss scale"
    ):
        train(run)


def test_overflows_are_those_of_finite_losses(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "guard.policy=skip")
    scaler = run.state.scaler = FixedLossScaler(run.state.model.named_parameters(), 8.0)
    run.guard._scaling = True
    nan_images(run, 3, 4)
    train(run)
    assert scaler.skipped == {}
    assert [e["event"] for e in read_metrics(Path("run"), "event")] == ["bad step"] * 2


def test_nothing_is_learned_of_a_loss_that_is_refused(arch: Path, shards: list[str]) -> None:
    settings = ("guard.policy=skip", "guard.rise=2", "watch.ignore=2", "log.every=1", "steps=8")
    run = run_of(arch, shards, *settings)

    def bomb(_: Any, inputs: Any, out: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return out | {"logit_scale": out["logit_scale"] * 1000} if run.state.step + 1 == 5 else None

    run.model.register_forward_hook(bomb)
    bounds: list[float] = []
    run.state.model.register_forward_pre_hook(lambda *_: bounds.append(run.guard.bound))
    train(run)
    assert [e["step"] for e in read_metrics(Path("run"), "event")] == [5]
    assert bounds[5] == bounds[4] < 6


def test_going_back_needs_checkpoints(arch: Path, shards: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every=0 and checkpoint\.minutes=0 has nothing to go back to"):
        run_of(arch, shards, "guard.policy=rewind", "checkpoint.every=0", "checkpoint.minutes=0")


def _names_the_block(arch: str, shards: list[str], bad: int) -> None:
    with distributed("cpu") as env:
        run = runs.run_of(Path(arch), shards, "guard.policy=skip", "watch.every=1", env=env)
        layer = run.state.model.get_submodule("visual.transformer.resblocks.1.mlp.c_fc")
        layer.register_forward_hook(
            lambda _, x, y: y * math.nan if env.rank == bad and run.state.step + 1 == 3 else None
        )
        train(run)
        env.barrier()
        if env.is_main:
            (event,) = read_metrics(Path("run"), "event")
            assert event["tensor"] == "visual.transformer.resblocks.1"


@pytest.mark.parametrize("bad", [0, 1])
def test_the_first_block_is_named_whichever_rank_has_it(bad: int, arch: Path, shards: list[str]) -> None:
    run_distributed(_names_the_block, 2, str(arch), shards, bad)
