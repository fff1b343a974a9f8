"""clipq-train and clipq-eval with a low-precision backend, on a CPU: the reference kernels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch

from clipq.build_backend import convert, image_tokens
from clipq.config.checks import ConfigError
from clipq.config.choices import Recipe
from clipq.config.groups import BackendConfig
from clipq.lowp import RECIPES
from clipq.lowp.speed import Speed, SpeedTable
from clipq.model.clip import create_model
from clipq.model.surgery import blocks
from tests.helpers import command, read_metrics, tiny_arch


def run(world: Path, name: str, *overrides: str, **env: str) -> list[float]:
    command(
        "train",
        *("model.name=tiny.json", "data.shards=data/*.tar", "batch_size=16", "schedule.warmup=3", "data.shuffle=64"),
        *(f"name={name}", "data.workers=0", "optim.lr=2e-3", "log.every=5", "checkpoint.every=6", *overrides),
        cwd=world,
        **env,
    )
    return [row["loss"] for row in read_metrics(world / "runs" / name)]


def test_the_trainer_names_every_recipe() -> None:
    assert [r.value for r in Recipe] == [*RECIPES]


def test_switchback_trains_resumes_evaluates_and_loads_in_openclip(world: Path) -> None:
    bf16 = torch.tensor(run(world, "bf16", "steps=12"))
    whole = torch.tensor(run(world, "whole", "backend=switchback", "steps=12"))
    difference = (whole - bf16).abs()
    assert whole[-1] < whole[0]
    assert 1e-5 < difference.mean() < 0.1, "equal to bf16 would mean that nothing was converted"
    log = (world / "runs" / "whole" / "logs" / "rank_0.log").read_text()
    assert "switchback: 12 linear layers, 3 blocks fused (reference)" in log

    run(world, "halves", "backend=switchback", "steps=6", "schedule.decay=constant")
    resumed = run(world, "halves", "backend=switchback", "steps=12", "schedule.decay=constant")
    straight = run(world, "straight", "backend=switchback", "steps=12", "schedule.decay=constant")
    assert resumed == straight

    task = [f"eval.tasks.zero_shot.{k}" for k in ("shards=data/*.tar", "classnames=data/classnames.txt")]
    task.append("eval.tasks.zero_shot.templates=data/templates.txt")
    command("eval", "checkpoint=runs/whole", "backend=switchback", "eval=zero_shot", "output=o.json", *task, cwd=world)
    result = json.loads((world / "o.json").read_text())
    assert result["recipe"] == "switchback"
    assert result["results"][0]["metrics"]["images"] == 128

    weights = world / "runs" / "whole" / "checkpoints" / "step_00000012" / "model.safetensors"
    (world / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": json.loads((world / "tiny.json").read_text()), "preprocess_cfg": {}})
    )
    model = open_clip.create_model(f"local-dir:{world}", load_weights=False)
    open_clip.load_checkpoint(model, str(weights))


def test_a_recipe_needs_blocks_to_convert() -> None:
    clip = SimpleNamespace(model=torch.nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="no tower of this model has clipq's blocks"):
        convert(clip, BackendConfig(recipe=Recipe.switchback), pairs=1, training=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_what_a_table_says_is_slower_stays_in_16_bits(world: Path) -> None:
    """The image tower has 4 patches and a class token, the text tower a context of 8: only their tokens differ."""
    speeds = (Speed("switchback", 32, 128, 16 * 5, 0.8), Speed("switchback", 32, 128, 16 * 8, 1.1))
    SpeedTable("a test", speeds).write(world / "table.json")
    losses = run(world, "skipped", "backend=switchback", "backend.skip=table.json", "steps=6")
    log = (world / "runs" / "skipped" / "logs" / "rank_0.log").read_text()
    assert "switchback: 4 linear layers, 1 blocks fused" in log
    assert (
        "visual.transformer.resblocks.0.attn.in_proj and 7 more: on a test a block of width 32 and 128 with 80" in log
    )
    assert losses != run(world, "not_skipped", "backend=switchback", "steps=6")
    assert losses == run(world, "skipped_again", "backend=switchback", "backend.skip=table.json", "steps=6")


def test_without_a_table_everything_is_converted_and_said(world: Path) -> None:
    run(world, "auto", "backend=switchback", "backend.skip=auto", "steps=4")
    log = (world / "runs" / "auto" / "logs" / "rank_0.log").read_text()
    assert "no table of speeds for the CPU" in log
    assert "python -m clipq.lowp.measure my_gpu.json" in log
    assert "switchback: 12 linear layers, 3 blocks fused" in log


def test_tokens_of_an_image(tmp_path: Path) -> None:
    clip = create_model(str(tiny_arch(tmp_path)), patch_dropout=0.5)
    full, dropped = (image_tokens(clip.model, training=t) for t in (False, True))
    seen = []
    block = blocks(clip.model)[0][1]
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for training in (False, True):
        clip.model.train(training).get_submodule("visual")(torch.zeros(1, 3, 16, 16))
    assert [full, dropped] == seen
    assert full > dropped
