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


@pytest.mark.gpu
def test_a_wait_counts_only_while_the_gpu_has_nothing_to_do() -> None:
    device = torch.device("cuda")

    def busy(seconds: float) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        end.synchronize()
        torch.cuda._sleep(int(10_000_000 * seconds * 1000 / begin.elapsed_time(end)))

    def share(work: float, wait: float) -> float:
        busy(0.001)
        meter = Meter(seconds=0.0, device=device, flops_per_image=None, world_size=1)
        start = time.perf_counter()
        busy(work)
        meter.count(1)
        with meter.waiting():
            time.sleep(wait)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        return (meter.interval()["data_wait"] or 0.0) * elapsed

    assert share(work=0.4, wait=0.2) < 0.001
    assert 0.15 < share(work=0.2, wait=0.4) < 0.25
    assert 0.19 < share(work=0.0, wait=0.2) < 0.25
