"""clipq-train with each optimizer: it trains and resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import colour_shards, command, read_metrics, tiny_arch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    colour_shards(folder / "data", [40, 31, 57])
    tiny_arch(folder)
    return folder


def losses(world: Path, name: str, *overrides: str) -> list[float]:
    command(
        "train",
        *("model.name=tiny.json", "data.shards=data/*.tar", "batch_size=16", "schedule.warmup=2", "data.shuffle=64"),
        *(f"name={name}", "data.workers=0", "optim.lr=1e-2", "log.every=5", "schedule.decay=constant", *overrides),
        cwd=world,
    )
    return [row["loss"] for row in read_metrics(world / "runs" / name)]


def test_stable_adamw_trains_and_resumes(world: Path) -> None:
    adamw = losses(world, "adamw", "steps=14", "optim.beta2=0.99")
    stable = losses(world, "stable", "steps=14", "optim=stable_adamw")
    unclipped = losses(world, "unclipped", "steps=14", "optim=stable_adamw", "optim.clip_threshold=inf")
    assert stable[-1] < stable[0]
    assert unclipped == pytest.approx(adamw, abs=2e-3), "without clipping it is AdamW"
    assert max(abs(a - b) for a, b in zip(stable, adamw, strict=True)) > 1e-2, "with it, it is not"
    losses(world, "halves", "steps=7", "optim=stable_adamw")
    assert losses(world, "halves", "steps=14", "optim=stable_adamw") == stable
