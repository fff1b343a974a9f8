"""The run folder in trouble: two commands in it, a place that cannot be written, a damaged checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import colour_samples, colour_shards, command, free_port, read_metrics, tiny_arch, write_shard


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    colour_shards(folder / "data", [40, 31])
    tiny_arch(folder)
    return folder


def overrides(*more: str) -> list[str]:
    settings = ["model.name=tiny.json", "data.shards=data/*.tar", "data.workers=1", "batch_size=16", "backend=fp32"]
    return [*settings, "log.every=1", *more]


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """A run of two steps without evaluation."""
    command("train", *overrides("name=finished", "steps=2"), cwd=world)
    return world / "runs" / "finished"


def refused(world: Path, *more: str, **env: str) -> str:
    """What the command says that ends with one message."""
    done = command("train", *overrides(*more), cwd=world, check=False, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def test_second_command_in_a_run_folder_is_refused(world: Path) -> None:
    arguments = overrides("name=busy", "steps=100000", "checkpoint.minutes=0", "checkpoint.every=0")
    first = subprocess.Popen(
        [sys.executable, "-m", "clipq.cli.train", *arguments],
        cwd=world,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert first.stdout is not None
    try:
        for line in first.stdout:
            if line.startswith("step"):
                break
        assert first.poll() is None
        said = refused(world, "name=busy", "steps=100000")
        assert "another process trains in runs/busy" in said
        assert "name=" in said
        ranks = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
                *("--master_port", str(free_port()), "-m", "clipq.cli.train", *arguments),
            ],
            cwd=world,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ranks.returncode != 0
        assert ranks.stderr.count("another process trains in runs/busy") == 1, "every rank ends, rank 0 says why"
        assert first.poll() is None, "the run is left alone"
    finally:
        # The trainer alone: its loader process lives on for seconds, and must not keep the lock.
        first.send_signal(signal.SIGKILL)
        first.wait()
    done = command("train", *overrides("name=busy", "steps=2"), cwd=world)
    assert "finished" in done.stdout


def test_runs_that_cannot_be_written(world: Path) -> None:
    said = refused(world, "name=x", "runs=data/00000.tar")
    assert "cannot write the run folder data/00000.tar/x: Not a directory" in said
    assert "runs=" in said


def test_full_disk_is_one_message(world: Path, small_disk: Path) -> None:
    done = command("train", *overrides("name=x", "steps=2", f"runs={small_disk}"), cwd=world, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert f"error: cannot write checkpoint {small_disk}/x/checkpoints/step_00000002: the disk is full" in done.stdout
    assert not list((small_disk / "x" / "checkpoints").iterdir())

    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - 20_000))  # so that the metrics do not fit
    done = command("train", *overrides("name=y", "steps=500", f"runs={small_disk}"), cwd=world, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert f"error: {small_disk}/y: the disk is full: make room" in done.stdout


def test_run_is_evaluated_by_the_same_command_once_its_data_are_right(finished: Path, world: Path) -> None:
    samples = [s | {"cls": "0" if n < 100 else "7"} for n, s in enumerate(colour_samples(101))]
    write_shard(world / "late" / "0.tar", samples)
    shutil.copytree(finished, world / "runs" / "judged")
    task = "eval.tasks.zero_shot"
    arguments = overrides("name=judged", "steps=2", "eval=zero_shot", f"{task}.shards=late/0.tar", "eval.workers=0")
    arguments.append(f"{task}.classnames=data/classnames.txt")
    done = command("train", *arguments, cwd=world, check=False)
    assert done.returncode == 1
    assert "error: evaluation zero_shot: an image has class 7, but the 4 class names" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    write_shard(world / "late" / "0.tar", samples[:100])
    done = command("train", *arguments, cwd=world)
    (row,) = read_metrics(world / "runs" / "judged", "eval")
    assert (row["step"], row["metrics"]["images"]) == (2, 100)
    done = command("train", *arguments, cwd=world)
    assert "has done its 2 steps" in done.stdout


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "config.yaml"])
def test_damaged_checkpoint_is_one_message(name: str, finished: Path, world: Path) -> None:
    run = f"damaged_{name.split('.')[0]}"
    file = shutil.copytree(finished, world / "runs" / run) / "checkpoints" / "step_00000002" / name
    content = file.read_bytes()
    file.unlink()
    for damage in ("missing", "cut") if name != "config.yaml" else ("missing",):
        if damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        said = refused(world, f"name={run}", "steps=2")
        assert f"runs/{run}/checkpoints/step_00000002" in said
        assert "remove " in said


def test_key_of_wandb_is_asked_for_before_the_model(world: Path) -> None:
    home = {"HOME": str(world), "WANDB_API_KEY": "", "NETRC": str(world / "none"), "WANDB_CONFIG_DIR": str(world)}
    said = refused(world, "name=w", "model.name=no_such_model", "log.wandb=online", **home)
    assert "log.wandb=online: no API key" in said
    assert "wandb login" in said


def test_cache_that_cannot_be_written(world: Path) -> None:
    done = command("train", "data=synthetic", "name=c", cwd=world, check=False, CLIPQ_CACHE="data/00000.tar/cache")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("rendering")]
    assert len(lines) == 1, done.stderr
    assert "train: cannot write the built-in data set to" in lines[0]
    assert "CLIPQ_CACHE" in lines[0]
