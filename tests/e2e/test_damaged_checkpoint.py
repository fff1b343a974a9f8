"""A run whose newest checkpoint is damaged goes on from the one before, on every rank, and is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import read_metrics, start_ranks


def settings(world: Path, name: str) -> list[str]:
    return [
        *(f"model.name={world}/tiny.json", f"data.shards={world}/data/*.tar", "data.workers=1", "data.lanes=2"),
        *("batch_size=16", "steps=6", "schedule.warmup=2", "backend=fp32", "log.every=1"),
        *("checkpoint.every=2", "checkpoint.keep_last=3", f"name={name}"),
    ]


def codes_and_words(world: Path, name: str, ranks: int) -> tuple[list[int], str]:
    codes = [process.wait(timeout=120) for process in start_ranks(world, settings(world, name), ranks)]
    return codes, (world / "output").read_text()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_one_before_is_taken(ranks: int, world: Path) -> None:
    whole, name = world / "runs" / f"whole_{ranks}", f"damaged_{ranks}"
    codes, said = codes_and_words(world, whole.name, ranks)
    assert codes == [0] * ranks, said
    folder = shutil.copytree(whole, world / "runs" / name) / "checkpoints"
    flip(folder / "step_00000006" / "model.safetensors")
    (folder / "step_00000004" / "state.pt").unlink()
    codes, said = codes_and_words(world, name, ranks)
    assert codes == [0] * ranks, said
    assert said.count("step_00000006 is damaged: model.safetensors has changed since it was written") == 1
    assert said.count("step_00000004 is damaged: state.pt is missing") == 1
    assert f"resumed from runs/{name}/checkpoints/step_00000002 at step 2" in said
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in (2, 4, 6)]
    last = "checkpoints/step_00000006/model.safetensors"
    ours, theirs = load_file(folder.parent / last), load_file(whole / last)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    losses = [[row["loss"] for row in read_metrics(f)] for f in (folder.parent, whole)]
    assert losses[0] == losses[1]

    for path in folder.iterdir():
        flip(path / "state.pt")
    codes, said = codes_and_words(world, name, ranks)
    assert codes == [2] * ranks
    assert said.count("no checkpoint of this run is whole: ") == 1
    assert "Traceback" not in said
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in (2, 4, 6)]
