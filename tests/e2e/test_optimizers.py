"""clipq-train with each optimizer: it trains, resumes exactly, and may be changed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import command, read_metrics


def losses(world: Path, name: str, *overrides: str) -> list[float]:
    command(
        "train",
        *("model.name=tiny.json", "data.shards=data/*.tar", "batch_size=16", "schedule.warmup=2", "data.shuffle=64"),
        *(f"name={name}", "data.workers=0", "optim.lr=1e-2", "log.every=5", "schedule.decay=constant"),
        *("backend=fp32", *overrides),
        cwd=world,
    )
    return [row["loss"] for row in read_metrics(world / "runs" / name)]


@pytest.mark.slow
def test_stable_adamw_trains_and_resumes(world: Path) -> None:
    adamw = losses(world, "adamw", "steps=14", "optim.beta2=0.99")
    clipped = ("optim=stable_adamw", "optim.clip_threshold=0.5")  # at 1 hardly a step of so few is
    stable = losses(world, "stable", "steps=14", *clipped)
    unclipped = losses(world, "unclipped", "steps=14", "optim=stable_adamw", "optim.clip_threshold=inf")
    assert stable[-1] < stable[0]
    assert unclipped == pytest.approx(adamw, abs=1e-3), "without clipping it is AdamW"
    assert max(abs(a - b) for a, b in zip(stable, adamw, strict=True)) > 1e-2, "with it, it is not"
    losses(world, "halves", "steps=7", *clipped)
    assert losses(world, "halves", "steps=14", *clipped) == stable
    # the states are interchangeable: a run may change its optimizer, and its settings, on the way
    losses(world, "changed", "steps=7", "optim.beta2=0.99")
    changed = losses(world, "changed", "steps=14", "optim=stable_adamw", "optim.clip_threshold=inf")
    assert changed == pytest.approx(adamw, abs=1e-3)
    log = (world / "runs" / "changed" / "logs" / "rank_0.log").read_text()
    assert "changed since the checkpoint: optim.name: adamw -> stable_adamw" in log
    losses(world, "other", "steps=7", "optim.beta2=0.99")
    other = losses(world, "other", "steps=14", "optim.beta2=0.5")
    assert other[:8] == adamw[:8], "the eighth loss is that of the weights of the seventh step"
    assert other[9:] != adamw[9:]
