"""clipq-train and clipq-eval with a low-precision backend, on a CPU: the reference kernels."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from clipq.build import convert
from clipq.config.choices import Recipe
from clipq.config.groups import BackendConfig, ConfigError
from clipq.lowp import RECIPES
from tests.helpers import colour_shards, command, read_metrics, tiny_arch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    colour_shards(folder / "data", [40, 31, 57])
    tiny_arch(folder)
    return folder


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
    assert 1e-5 < difference.max() < 0.1, "equal to bf16 would mean that nothing was converted"
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
    with pytest.raises(ConfigError, match="no tower of this model has clipq's blocks"):
        convert(torch.nn.Linear(4, 4), BackendConfig(recipe=Recipe.switchback))
