"""Estimates of memory and time beside what was measured on GPUs (docs/benchmarks), and their arithmetic."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipq.log.meters import PEAK_FLOPS, flops_per_pair
from clipq.lowp import convert_linears
from clipq.model.clip import ClipModel, create_model
from clipq.model.surgery import blocks
from clipq.train.estimate import Layout, Memory, loss_bytes, memory, step_seconds, units, utilization
from tests.helpers import REPO

MEMORY, TIME = 0.03, 0.10
"""Tolerances of the estimates; docs/slurm.md states them."""
GIB = 2**30
S_8 = str(REPO / "configs" / "arch" / "ViT-S-8-64.json")


def recorded(name: str) -> dict[str, Any]:
    return json.loads((REPO / "docs" / "benchmarks" / f"{name}.json").read_text())


def model_of(name: str, recipe: str, patch_dropout: float | None = None) -> ClipModel:
    clip = create_model(name, patch_dropout=patch_dropout, meta=True)
    if recipe != "bf16":
        convert_linears(clip.model, recipe, filter=lambda name, _: "resblocks" in name)
    return clip


def memory_of(
    clip: ClipModel, layout: Layout, *, checkpointing: bool = False, gathered: int = 5, byte_images: bool = True
) -> Memory:
    height, width = clip.preprocess.size
    parts = units(
        clip.model,
        clip.preprocess.size,
        clip.context_length,
        layout,
        autocast=torch.bfloat16,
        checkpointing=checkpointing,
    )
    inputs = layout.pairs * 3 * height * width * (1 if byte_images else 4)
    loss = loss_bytes(layout.pairs, layout.pairs * layout.world_size, clip.config["embed_dim"])
    return memory(clip.model, parts, layout, inputs=inputs, loss=loss, gathered=gathered)


STEPS = [
    (file, column)
    for file in ("step_vit_b_16_h100", "step_vit_l_h100", "step_vit_h_h100", "step_vit_h_peers_h100")
    for column in recorded(file)["results"]["columns"]
    if column in ("bf16", "switchback", "switchback_r", "switchback_m", "switchback_fp8")
]


def test_steps_are_there_to_be_compared_with() -> None:
    assert len(STEPS) == 11


@pytest.mark.parametrize(("file", "column"), STEPS)
def test_memory_of_a_step_is_as_measured(file: str, column: str) -> None:
    results = recorded(file)["results"]
    settings = results["settings"]
    clip = model_of(settings["model"], column, settings["patch_dropout"])
    found = memory_of(clip, Layout(settings["batch"]), byte_images=False)  # the benchmark's images are fp32
    assert found.peak / GIB == pytest.approx(results["columns"][column]["peak_gib"], rel=MEMORY)


LAYOUTS = {
    "none": Layout(128),
    "ddp": Layout(128, buckets=True),
    "fsdp": Layout(128, sharded=True),
    "fsdp, weights kept": Layout(128, sharded=True, reshard=False),
    "ddp, checkpointing": Layout(128, buckets=True),
}


def test_memory_of_strategies_is_as_measured() -> None:
    results = recorded("parallel_vit_l_h100")["results"]
    assert results["settings"].keys() == LAYOUTS.keys()
    assert results["batch"] == 128
    for name, layout in LAYOUTS.items():
        found = memory_of(model_of("ViT-L-14", results["backend"]), layout, checkpointing="checkpointing" in name)
        assert found.peak / GIB == pytest.approx(results["settings"][name]["peak_gib"], rel=MEMORY), name


def test_memory_of_a_whole_run_is_as_measured() -> None:
    values = recorded("tiny_imagenet_h100")["values"]
    found = memory_of(model_of(S_8, "bf16"), Layout(1024))
    assert found.peak / GIB == pytest.approx(values["memory_gib"], rel=MEMORY)


def test_memory_of_the_loss_is_as_measured() -> None:
    results = recorded("loss_h100")["results"]
    for pairs, found in results["pairs"].items():
        measured = found["columns"]["tiles of 2^24"]["extra_mib"]
        assert loss_bytes(int(pairs), int(pairs), results["width"]) / 2**20 == pytest.approx(measured, rel=0.25)


TIMES: dict[str, tuple[str, str, float | None, int, Callable[[dict[str, Any]], float]]] = {
    # what the table of utilizations was made of
    **{
        f"{file} {column}": (
            recorded(file)["results"]["settings"]["model"],
            column,
            0.5,
            256,
            lambda results, column=column: results["columns"][column]["graph_step_ms"],
        )
        for file, column in STEPS
        if "peers" not in file
    },
    # what it was not
    "parallel_vit_l_h100": ("ViT-L-14", "switchback", None, 128, lambda r: r["settings"]["none"]["recorded_ms"]),
    "save_vit_h_h100": ("ViT-H-14", "switchback", None, 64, lambda r: r["quiet_ms"]),
    "watch_h100": ("ViT-B-16", "bf16", None, 256, lambda r: r["recorded"]["unwatched_ms"]),
    "trainer_vit_h_h100 bf16": (
        *("ViT-H-14", "bf16", 0.5, 256),
        lambda r: 256e3 / r["bf16"]["trainer_images_per_second"],
    ),
}


@functools.cache
def flops_of(model: str, patch_dropout: float | None) -> tuple[ClipModel, float]:
    clip = create_model(model, patch_dropout=patch_dropout, meta=True)
    return clip, flops_per_pair(clip.model, clip.preprocess.size, clip.context_length)


@pytest.mark.parametrize("name", TIMES)
def test_time_of_a_recorded_step_is_as_measured(name: str) -> None:
    model, recipe, patch_dropout, pairs, milliseconds = TIMES[name]
    clip, flops = flops_of(model, patch_dropout)
    seconds = step_seconds(
        flops,
        Layout(pairs),
        peak=PEAK_FLOPS["H100"],
        utilization=utilization(clip.model, recipe),
        checkpointing=False,
        features=clip.config["embed_dim"],
    )
    assert 1e3 * seconds == pytest.approx(milliseconds(recorded(name.split()[0])["results"]), rel=TIME)


def test_time_of_the_loss_is_as_measured() -> None:
    results = recorded("loss_h100")["results"]
    measured = results["pairs"]["65536"]["columns"]["tiles of 2^24"]["ms"]
    options = {"peak": PEAK_FLOPS["H100"], "utilization": 0.4, "checkpointing": False, "features": results["width"]}
    assert 1e3 * step_seconds(0.0, Layout(65536), **options) == pytest.approx(measured, rel=0.05)
    # a process's part of it grows with the pairs of all
    assert step_seconds(0.0, Layout(256, world_size=8), **options) == pytest.approx(
        8 * step_seconds(0.0, Layout(256), **options)
    )


def test_forwards_that_are_made_again_take_a_third() -> None:
    """n micro-batches go forward 2n - 1 times; checkpointing once more each."""
    options = {"peak": 1.0, "utilization": 0.5, "features": 0}
    once = step_seconds(3.0, Layout(8), checkpointing=False, **options)
    assert once == 48
    assert step_seconds(3.0, Layout(8), checkpointing=True, **options) == pytest.approx(once * 4 / 3)
    four = step_seconds(3.0, Layout(8, accumulation=4), checkpointing=False, **options)
    assert four == pytest.approx(once * (2 * 4 - 1 + 2 * 4) / (3 * 4))


def test_a_model_without_numbers_has_the_shapes_and_operations_of_one_with(arch: Path) -> None:
    torch.manual_seed(0)
    meta, real = (create_model(str(arch), patch_dropout=0.5, meta=m) for m in (True, False))
    assert {p.device.type for p in meta.model.parameters()} == {"meta"}
    assert [(n, p.shape) for n, p in meta.model.named_parameters()] == [
        (n, p.shape) for n, p in real.model.named_parameters()
    ]
    assert [block.attn.causal for _, block in blocks(meta.model)] == [b.attn.causal for _, b in blocks(real.model)]
    assert flops_per_pair(meta.model, (16, 16), 8) == flops_per_pair(real.model, (16, 16), 8)


def test_the_model_is_left_as_it_was(arch: Path) -> None:
    clip = create_model(str(arch))
    clip.model.eval()
    _, first = blocks(clip.model)[0]
    first.forward = own = lambda x, **_: x
    memory_of(clip, Layout(4))
    assert first.forward is own
    assert all("forward" not in block.__dict__ for _, block in blocks(clip.model)[1:])
    assert not clip.model.training
    assert all(p.device.type == "cpu" for p in clip.model.parameters())


def test_activations_are_those_of_a_micro_batch() -> None:
    clip = model_of("ViT-B-32", "bf16")
    one, four = (memory_of(clip, Layout(1024, accumulation=n), byte_images=False) for n in (1, 4))
    inputs = 1024 * 3 * 224 * 224 * 4
    assert (four.activations - inputs) / (one.activations - inputs) == pytest.approx(1 / 4, rel=0.05)
    assert one.gradients == 0, "they come as activations go"
    assert four.gradients == one.weights, "they are added up"


def test_shards_are_parts_of_matrices() -> None:
    clip = model_of("ViT-B-32", "bf16")
    whole = memory_of(clip, Layout(8, sharded=True), gathered=2)
    layout = Layout(8, world_size=64, shards=64, sharded=True)
    parts = memory_of(clip, layout, gathered=2)
    small = sum(p.numel() for p in clip.model.parameters() if p.ndim < 2)
    matrices = sum(p.numel() for p in clip.model.parameters() if p.ndim >= 2)
    assert whole.optimizer == 8 * (small + matrices)
    assert parts.peak >= 4 * (small + matrices), "each process builds the whole model"
    many = memory_of(clip, replace(layout, pairs=4096), gathered=2)
    assert many.optimizer == pytest.approx(8 * (small + matrices / 64), rel=1e-3)


def test_what_is_not_trained_has_neither_gradients_nor_moments(arch: Path) -> None:
    clip = create_model(str(arch))
    layout = Layout(2, buckets=True)
    assert memory_of(clip, layout).optimizer == 8 * sum(p.numel() for p in clip.model.parameters())
    clip.model.get_submodule("visual").requires_grad_(False)
    trained = sum(p.numel() for p in clip.model.parameters() if p.requires_grad)
    found = memory_of(clip, layout)
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)


@pytest.mark.parametrize("name", ["RN50", "convnext_base"])
def test_towers_with_blocks_of_their_own_are_counted(name: str) -> None:
    clip = create_model(name, meta=True)
    eight, sixteen, thirty_two = (memory_of(clip, Layout(pairs)).activations for pairs in (8, 16, 32))
    assert thirty_two - sixteen == pytest.approx(2 * (sixteen - eight), rel=1e-3)
    assert (sixteen - eight) / 8 > 40e6, "bytes of a pair: some 20 M numbers of 16 bits"
