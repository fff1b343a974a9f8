from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from clipq.log.meters import Meter, flops_per_pair
from clipq.model.clip import create_model


def test_flops_are_those_of_the_shapes(arch: Path) -> None:
    """By hand: patch embedding, and in each block qkv, projection, MLP and the two products of attention."""
    clip = create_model(str(arch))

    def tower(width: int, tokens: int, layers: int) -> int:
        linear = tokens * width * width * (3 + 1 + 4 + 4)
        attention = 2 * tokens * tokens * width
        return 2 * layers * (linear + attention)

    patches = 2 * 4 * 32 * (3 * 8 * 8)
    # what follows the class token and the end token: one product each with the projection
    projections = 2 * 32 * 16 + 2 * 16 * 16
    expected = 3 * (patches + tower(32, 5, 2) + tower(16, 8, 1) + projections)
    assert flops_per_pair(clip.model, (16, 16), 8) == pytest.approx(expected, rel=1e-6)


def test_counting_changes_nothing(arch: Path) -> None:
    clip = create_model(str(arch), patch_dropout=0.5)
    clip.model.eval()
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    flops_per_pair(clip.model, (16, 16), 8)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1)), "the generator has moved"
    assert not clip.model.training
    assert all(torch.equal(before[k], v) for k, v in clip.model.state_dict().items())


def test_patch_dropout_saves_work(arch: Path) -> None:
    all_patches, half = (
        flops_per_pair(create_model(str(arch), patch_dropout=p).model, (16, 16), 8) for p in (0.0, 0.5)
    )
    assert half < 0.8 * all_patches


def test_meter_counts_training_time_only() -> None:
    meter = Meter(seconds=100.0, device=torch.device("cpu"), flops_per_image=1e9, world_size=1)
    with meter.waiting():
        time.sleep(0.1)
    time.sleep(0.1)
    with meter.paused():
        time.sleep(0.8)
    meter.count(50)
    row = meter.interval()
    assert 100.2 <= meter.seconds() < 100.7
    assert 0.3 < row["data_wait"] < 0.6  # pyright: ignore
    assert 150 < row["images_per_second"] <= 250  # pyright: ignore
    assert row["mfu"] is None
    assert row["memory_gib"] > 0  # pyright: ignore
    time.sleep(0.05)
    assert meter.interval()["data_wait"] == 0
