"""clipq-train as a user runs it: from shards to a checkpoint, killed and resumed, on two processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import colour_shards, command, command_on_two_ranks, read_metrics, tiny_arch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    colour_shards(folder / "data", [40, 31, 57, 25, 47])
    tiny_arch(folder)
    return folder


def overrides(world: Path, *more: str) -> list[str]:
    return [
        f"model.name={world}/tiny.json",
        f"data.shards={world}/data/*.tar",
        "data.shuffle=64",
        "data.workers=2",
        "batch_size=16",
        "steps=30",
        "schedule.warmup=5",
        "optim.lr=1e-3",
        "backend=fp32",
        "log.every=5",
        "checkpoint.every=10",
        "eval=zero_shot",
        f"eval.tasks.zero_shot.shards={world}/data/*.tar",
        f"eval.tasks.zero_shot.classnames={world}/data/classnames.txt",
        f"eval.tasks.zero_shot.templates={world}/data/templates.txt",
        "eval.workers=1",
        *more,
    ]


def train_rows(folder: Path) -> list[tuple]:
    keys = ("step", "samples", "lr", "loss", "logit_scale")
    return [tuple(row[k] for k in keys) for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole_run(world: Path) -> Path:
    """30 steps without interruption."""
    command("train", *overrides(world, "name=whole"), cwd=world)
    return world / "runs" / "whole"


def test_run_folder(whole_run: Path, world: Path) -> None:
    rows = read_metrics(whole_run)
    assert [r["step"] for r in rows] == list(range(1, 31))
    assert rows[-1]["samples"] == 480
    assert rows[-1]["loss"] < rows[0]["loss"]
    (evaluation,) = read_metrics(whole_run, "eval")
    assert evaluation["metrics"]["images"] == 200
    assert evaluation["metrics"]["chance"] == 0.25
    examples = json.loads((whole_run / "examples" / "zero_shot.json").read_text())
    assert len(examples["examples"]) == 12
    assert (whole_run / "logs" / "rank_0.log").read_text().count("saved") == 3
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["step_00000020", "step_00000030"]
    environment = json.loads((whole_run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert (whole_run / "config.yaml").read_text().count("steps: 30")
    assert not (world / "outputs").exists()  # Hydra's own folder


def test_openclip_loads_the_checkpoint(whole_run: Path, world: Path) -> None:
    open_clip.add_model_config(world / "tiny.json")
    weights = whole_run / "checkpoints" / "step_00000030" / "model.safetensors"
    theirs = open_clip.create_model("tiny", pretrained=str(weights))
    for key, value in load_file(weights).items():
        torch.testing.assert_close(theirs.state_dict()[key], value)


@pytest.mark.slow
def test_checkpoint_carries_its_architecture(world: Path, tmp_path: Path) -> None:
    """The JSON file that the run was given is gone, its settings were not the file's, and the folder is another."""
    own = tmp_path / "own.json"
    shutil.copy(world / "tiny.json", own)
    settings = ["model.image_size=24", "model.layer_scale_init=0.5", "model.qk_norm=true", "name=own", "steps=6"]
    command("train", *overrides(world, *settings, f"model.name={own}"), cwd=world)
    own.unlink()
    evaluation = [o for o in overrides(world) if o.startswith("eval")]
    done = command("eval", f"checkpoint={world}/runs/own", *evaluation, cwd=tmp_path)
    assert f"({own})" in done.stdout, "it is called as it was"
    (at_the_end,) = read_metrics(world / "runs" / "own", "eval")
    found = json.loads((world / "runs" / "own" / "eval" / "step_00000006.json").read_text())
    assert found["results"][0]["metrics"] == pytest.approx(at_the_end["metrics"])
    assert found["model"] == str(own)


def test_killed_run_goes_on_as_if_nothing_had_happened(whole_run: Path, world: Path) -> None:
    """Kill -9 between two checkpoints; metrics and weights then equal those of the run that was left alone."""
    folder = world / "runs" / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "clipq.cli.train", *overrides(world, "name=killed", "log.every=1")],
        cwd=world,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        saved = (folder / "checkpoints" / "step_00000010").exists()  # which is written while training goes on
        if saved and len(read_metrics_of_live_run(folder)) >= 13:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 13 <= len(read_metrics_of_live_run(folder)) < 30, "the kill came too late to show anything"
    # what a kill in the middle of a save leaves behind
    (folder / "checkpoints" / ".part_step_00000020").mkdir(exist_ok=True)

    done = command("train", *overrides(world, "name=killed"), cwd=world)
    assert "resumed from" in done.stdout
    assert train_rows(folder) == train_rows(whole_run)
    last = "checkpoints/step_00000030"
    ours, theirs = (load_file(f / last / "model.safetensors") for f in (folder, whole_run))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    assert not list((folder / "checkpoints").glob(".part*"))


def read_metrics_of_live_run(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1] if '"train"' in line]


def test_a_run_killed_before_its_first_checkpoint_says_that_it_begins_anew(world: Path) -> None:
    run = overrides(world, "name=anew", "steps=2", "schedule.warmup=1", "eval=none")
    run = [o for o in run if not o.startswith("eval.")]
    assert "begins anew" not in command("train", *run, cwd=world).stdout
    shutil.rmtree(world / "runs" / "anew" / "checkpoints")
    done = command("train", *run, cwd=world)
    assert "runs/anew has no complete checkpoint: the run begins anew" in done.stdout
    assert [row["step"] for row in read_metrics(world / "runs" / "anew")] == [1, 2]


def test_finished_run_says_so(whole_run: Path, world: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_text()
    done = command("train", *overrides(world, "name=whole"), cwd=world)
    assert "has done its 30 steps" in done.stdout
    assert (whole_run / "metrics.jsonl").read_text() == before


def test_resume_refuses_what_does_not_fit(whole_run: Path, world: Path) -> None:
    done = command("train", *overrides(world, "name=whole", "batch_size=32"), cwd=world, check=False)
    assert done.returncode == 2
    assert "batch_size: 16 -> 32" in done.stderr
    done = command("train", *overrides(world, "name=whole", "resume=never"), cwd=world, check=False)
    assert done.returncode == 2
    assert "resume=never" in done.stderr


def test_resume_knows_its_shards_by_name(whole_run: Path, world: Path) -> None:
    """Data may move, but a file more would change the order of all samples without a word."""
    shutil.copytree(world / "data", world / "moved")
    moved = overrides(world, "name=whole", f"data.shards={world}/moved/*.tar")
    done = command("train", *moved, cwd=world)
    assert "has done its 30 steps" in done.stdout
    assert f"changed since the checkpoint: data.shards: {world}/data/*.tar -> {world}/moved/*.tar" in done.stdout
    shutil.copy(world / "moved" / "00000.tar", world / "moved" / "00005.tar")
    done = command("train", *moved, cwd=world, check=False)
    assert done.returncode == 2
    assert "step_00000030 was trained on 5 shards, and the 6 of now have other names" in done.stderr


def test_two_processes_make_the_run_of_one(whole_run: Path, world: Path) -> None:
    """Two processes make one run: one folder, one voice, a log file each, and the batches that one process has. The run
    then goes on with one process and other loaders from where two were."""
    done = command_on_two_ranks("train", *overrides(world, "name=two", "data.workers=1"), cwd=world)
    assert done.returncode == 0, done.stderr
    folder = world / "runs" / "two"
    assert [r["step"] for r in read_metrics(folder)] == list(range(1, 31))
    assert all(r["slowest_rank"] in (0, 1) for r in read_metrics(folder) if "data_wait" in r)
    assert done.stdout.count("step 10/30") == 1, "only rank 0 talks"
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (folder / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    (evaluation,) = read_metrics(folder, "eval")
    assert evaluation["metrics"]["images"] == 200
    expected = [row["loss"] for row in read_metrics(whole_run)]
    assert [row["loss"] for row in read_metrics(folder)] == pytest.approx(expected, rel=1e-3)

    shutil.rmtree(folder / "checkpoints" / "step_00000030")
    done = command("train", *overrides(world, "name=two", "data.workers=3"), cwd=world)
    assert "1 processes, and there were 2: samples go on in the same order" in done.stdout
    assert [row["loss"] for row in read_metrics(folder)] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_two_processes_in_shards_make_the_run_of_one(whole_run: Path, world: Path) -> None:
    """Losses and accuracy of one process, from shards; one process takes their checkpoint over."""
    settings = overrides(world, "name=shards", "data.workers=1", "watch.every=5")
    done = command_on_two_ranks("train", *settings, "parallel=fsdp", cwd=world)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "fsdp: 1 copy of the model, in 2 shards; all weights travel as" in done.stdout
    folder, expected = world / "runs" / "shards", read_metrics(whole_run)
    assert [row["loss"] for row in read_metrics(folder)] == pytest.approx([r["loss"] for r in expected], rel=1e-3)
    (evaluation,), (of_one,) = read_metrics(folder, "eval"), read_metrics(whole_run, "eval")
    assert evaluation["metrics"] == pytest.approx(of_one["metrics"], abs=0.02)

    shutil.rmtree(folder / "checkpoints" / "step_00000030")
    command("train", *settings, "parallel=none", cwd=world)
    assert [row["loss"] for row in read_metrics(folder)] == pytest.approx([r["loss"] for r in expected], rel=1e-3)


def test_resume_refuses_another_order_of_samples(whole_run: Path, world: Path) -> None:
    for setting, says in {
        "seed=3": "seed: 0 -> 3",
        "data.shuffle=32": "data.shuffle: 64 -> 32",
        "data.lanes=5": "data.lanes=5: .*step_00000030 was trained with data.lanes=4",
    }.items():
        done = command("train", *overrides(world, "name=whole", "steps=40", setting), cwd=world, check=False)
        assert done.returncode == 2
        assert re.search(says, done.stderr), done.stderr


def test_multirun_trains_each_job_in_a_folder_of_its_own(world: Path) -> None:
    jobs = ["--multirun", *overrides(world, "steps=6", "eval=none", "optim.lr=1e-3,1e-4")]
    jobs = [j for j in jobs if not j.startswith("eval.")]
    refused = command("train", *jobs, "name=sweep", cwd=world, check=False)
    assert refused.returncode == 2
    assert "more than one job would use the run folder runs/sweep" in refused.stderr
    assert not (world / "runs" / "sweep" / "config.yaml").exists()
    command("train", *jobs, "name=sweep_${optim.lr}", cwd=world)
    rates = {p.name: read_metrics(p)[4]["lr"] for p in (world / "runs").glob("sweep_*")}
    assert rates == {"sweep_0.001": 1e-3, "sweep_0.0001": 1e-4}


def test_loss_that_goes_bad_ends_the_run_with_a_message(world: Path) -> None:
    arguments = overrides(world, "optim.lr=1e9", "name=bad", "eval=none")
    done = command("train", *(a for a in arguments if not a.startswith("eval.")), cwd=world, check=False)
    assert done.returncode == 1
    assert "lower optim.lr, lengthen schedule.warmup, set optim.clip_norm, or choose" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
