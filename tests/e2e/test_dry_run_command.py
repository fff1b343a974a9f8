"""`clipq-train … dry_run=true` as a user runs it: what it prints, its exit code, and that it leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers import command

SETTINGS = ("model.name=tiny.json", "batch_size=64", "steps=100", "name=planned", "dry_run=true")


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_plan_trains_nothing_and_leaves_nothing(world: Path) -> None:
    before = files(world)
    done = command("train", *SETTINGS, "data.shards='data/{00000..00002}.tar'", "gpus=8", cwd=world)
    assert "\nbatch_size: 64\n" in done.stdout, "the resolved configuration"
    assert "\nbatch        64 pairs a step, 8 on each; loss softmax\n" in done.stdout
    assert "\nsteps        100, 6,400 pairs\n" in done.stdout
    for title in ("run", "model", "operations", "checkpoints", "memory", "time", "data"):
        assert f"\n{title:12} " in done.stdout
    assert done.stderr == ""
    assert files(world) == before


def test_every_problem_is_told(world: Path) -> None:
    before = files(world)
    shards = "data.shards='data/{00001..00004}.tar'"
    done = command("train", *SETTINGS, shards, "gpus=24", cwd=world, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "train: batch_size=64 is not divisible by the 24 processes: the nearest that is: 72",
        "train: data.shards: no shard matches 'data/00003.tar'",
        "train: data.shards: no shard matches 'data/00004.tar'",
    ]
    assert files(world) == before


def test_the_built_in_set_is_not_rendered(world: Path) -> None:
    done = command("train", *SETTINGS, "data=synthetic", "eval=synthetic", cwd=world)
    assert "the run would render it first" in done.stdout
    assert not Path(os.environ["CLIPQ_CACHE"]).exists()
