"""clipq-train with accumulation: alone, on two ranks, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import command, command_on_two_ranks, read_metrics

SETTINGS = (
    *(
        "model.name=tiny.json",
        "data.shards=data/*.tar",
        "batch_size=16",
        "schedule.decay=constant",
        "data.shuffle=64",
        "data.lanes=2",
    ),
    *(
        "data.workers=0",
        "optim.lr=1e-2",
        "log.every=2",
        "watch.every=2",
        "backend=switchback",
        "backend.precision=fp32",
    ),
)


def losses(world: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_metrics(world / "runs" / name)]


def test_a_step_counts_the_whole_batch(world: Path) -> None:
    command("train", *SETTINGS, "steps=4", "name=four", "accumulation=4", "model.grad_checkpointing=true", cwd=world)
    rows = read_metrics(world / "runs" / "four")
    assert [row["samples"] for row in rows] == [16, 32, 48, 64]
    assert all(value > 0 for value in rows[1]["features"].values())
    assert "accumulation: 4" in (world / "runs" / "four" / "config.yaml").read_text()
    command("train", *SETTINGS, "steps=4", "name=one", cwd=world)
    assert losses(world, "four") == pytest.approx(losses(world, "one"), abs=1e-3)


@pytest.mark.slow
def test_two_ranks_and_a_resumed_run(world: Path) -> None:
    command("train", *SETTINGS, "steps=6", "name=alone", "accumulation=2", cwd=world)
    done = command_on_two_ranks("train", *SETTINGS, "steps=6", "name=ranks", "accumulation=4", cwd=world)
    assert done.returncode == 0, done.stderr
    assert losses(world, "ranks") == pytest.approx(losses(world, "alone"), abs=1e-2)
    random = (*SETTINGS, "accumulation=4", "model.patch_dropout=0.5")
    command("train", *random, "steps=6", "name=whole", cwd=world)
    command("train", *random, "steps=3", "name=halves", cwd=world)
    command("train", *random, "steps=6", "name=halves", cwd=world)
    assert losses(world, "halves") == losses(world, "whole")
