"""Checkpoints that are written while training goes on: what is in them, what training waits for, what a fault costs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from clipq.dist.env import distributed
from clipq.dist.stop import Stopped
from clipq.model.weights import write_weights
from clipq.train import checkpoint
from clipq.train.checkpoint import CheckpointError, load
from clipq.train.checksums import damage
from clipq.train.kept import newest
from clipq.train.loop import train
from clipq.train.run import Run, close
from clipq.train.state import TrainState
from tests.helpers import read_metrics, run_distributed
from tests.unit.train import runs
from tests.unit.train.saves import ENV, LOADER, fill, filled_state, names, saver, values
from tests.unit.train.test_stopping import ask_at

SECONDS = 60
"""That what is waited for may take; without a fault, milliseconds."""


def run_of(arch: Path, shards: list[str], *overrides: str, folder: Path = Path("run")) -> Run:
    with distributed("cpu") as env:
        return runs.run_of(arch, shards, "log.every=1", *overrides, env=env, folder=folder)


def writing_waits(monkeypatch: pytest.MonkeyPatch, step: int | None = None) -> tuple[threading.Event, threading.Event]:
    """Lets a write begin, of any step or of this one, and end when the second event is set; it sets the first."""
    begun, free = threading.Event(), threading.Event()

    def waits(*args: Any) -> None:
        if step is None or f"{step:08d}" in str(args[-1]):
            begun.set()
            assert free.wait(SECONDS)
        write_weights(*args)

    monkeypatch.setattr(checkpoint, "write_weights", waits)
    return begun, free


def writing_fails(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    def fails(*args: Any) -> None:
        if any(f"{step:08d}" in str(args[-1]) for step in steps):
            raise OSError(5, "Input/output error")
        write_weights(*args)

    monkeypatch.setattr(checkpoint, "write_weights", fails)


def test_what_changes_after_the_call_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times, for the second and third are copied where the first was."""
    state, checkpoints = filled_state(), saver(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        begun, free = writing_waits(monkeypatch)
        fill(state, step)
        checkpoints.save(state, loader=LOADER, wait=False)
        fill(state, -step)
        state.optimizer.param_groups[0]["lr"] = 99.0
        assert begun.wait(SECONDS)
        assert f"step_{step:08d}" not in names(tmp_path)
        free.set()
    checkpoints.wait()
    for step in (1, 2, 3):
        other = filled_state()
        load(checkpoints.path(step), other, ENV)
        assert (other.step, values(other)) == (step, {step})


def test_one_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, checkpoints = filled_state(1), saver(tmp_path)
    _, free = writing_waits(monkeypatch, step=1)
    checkpoints.save(state, loader=LOADER, wait=False)
    fill(state, 2)
    second = threading.Thread(target=lambda: checkpoints.save(state, loader=LOADER, wait=True))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert names(tmp_path) == [".part_step_00000001"]
    free.set()
    second.join(SECONDS)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_the_newest_is_the_one_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saver(tmp_path)
    _, free = writing_waits(monkeypatch)
    checkpoints.save(filled_state(1), loader=LOADER, wait=False)
    threading.Timer(0.3, free.set).start()
    assert newest(tmp_path) is None
    assert checkpoints.newest() == tmp_path / "step_00000001"


def test_training_goes_on(arch: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written after step 2 ends in step 4, which would else never come."""
    run = run_of(arch, shards, "checkpoint.every=2")
    _, free = writing_waits(monkeypatch, step=2)
    run.model.register_forward_hook(lambda *_: free.set() if run.state.step + 1 == 4 else None)
    train(run)
    assert free.is_set()
    assert names(Path("run/checkpoints")) == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize(("asked", "saved"), [(2, [2]), (3, [2, 3])])
def test_a_run_that_is_asked_to_end_waits(
    asked: int, saved: list[int], arch: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(arch, shards, "checkpoint.every=2")
    begun, free = writing_waits(monkeypatch, step=2)
    ask_at(run, asked)

    def slowly() -> None:
        assert begun.wait(SECONDS)
        time.sleep(0.5)
        free.set()

    threading.Thread(target=slowly).start()
    with pytest.raises(Stopped, match=f"after step {asked}, saved in run/checkpoints/step_{asked:08d}"):
        train(run)
    assert names(Path("run/checkpoints")) == [f"step_{step:08d}" for step in saved]


def test_a_run_that_fails_finishes_what_it_writes(
    arch: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(arch, shards, "checkpoint.every=2")
    _, free = writing_waits(monkeypatch, step=2)

    def fault(*_: Any) -> None:
        if run.state.step + 1 == 3:
            threading.Timer(0.3, free.set).start()
            raise ArithmeticError

    run.model.register_forward_hook(fault)
    with pytest.raises(ArithmeticError):
        train(run)
    assert names(Path("run/checkpoints")) == ["step_00000002"]


def test_a_failed_save_costs_no_training(
    arch: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(arch, shards, "checkpoint.every=2", "steps=8")
    writing_fails(monkeypatch, 4)
    train(run)
    assert "cannot write checkpoint run/checkpoints/step_00000004: [Errno 5]" in caplog.text
    assert names(Path("run/checkpoints")) == ["step_00000006", "step_00000008"]
    (event,) = read_metrics(Path("run"), "event")
    assert (event["event"], event["step"]) == ("failed save", 4)
    assert "Input/output error" in event["reason"]


def test_a_failed_save_of_the_step_at_which_a_run_is_asked_to_end_is_tried_again(
    arch: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(arch, shards, "checkpoint.every=2")
    writing_fails(monkeypatch, 4)
    ask_at(run, 4)
    with pytest.raises(CheckpointError, match="step_00000004"):
        train(run)
    assert names(Path("run/checkpoints")) == ["step_00000002"]
    assert [row["step"] for row in read_metrics(Path("run"), "event")] == [4]


def resized(disk: Path, megabytes: int) -> Path:
    """The small disk, with room for so much: a checkpoint of the tiny model has some 10 MB."""
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", disk], check=True)
    return disk


@pytest.mark.parametrize("seen", ["before it is written", "while it is written"])
@pytest.mark.parametrize("room_again", [True, False])
def test_a_disk_that_is_full_meanwhile(
    room_again: bool,
    seen: str,
    arch: Path,
    shards: list[str],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The older checkpoint stays, metrics go on where they find room; at the end there must be room."""
    resized(small_disk, 32)
    run = run_of(arch, shards, "checkpoint.every=2", folder=small_disk / "run")
    if seen == "while it is written":
        monkeypatch.setattr(run.checkpoints, "_need_room", lambda: None)
        close(run)
        run.writers = []  # which would find no room either, at some moment
    other, folder = small_disk / "other", small_disk / "run" / "checkpoints"

    def fill_up(*_: Any) -> None:
        if run.state.step + 1 == 4:
            run.checkpoints.wait()
            used = sum(p.stat().st_size for p in small_disk.rglob("*") if p.is_file())
            other.write_bytes(bytes(32 * 2**20 - used - 5_000_000))
        if run.state.step + 1 == 6 and room_again:
            run.checkpoints.wait()
            assert names(folder) == ["step_00000002"]
            other.unlink()

    run.model.register_forward_hook(fill_up)
    if room_again:
        train(run)
        assert names(folder) == ["step_00000002", "step_00000006"]
    else:
        with pytest.raises(CheckpointError, match="step_00000006: the disk is full: make room"):
            train(run)
        assert names(folder) == ["step_00000002"]
    assert "step_00000004: the disk is full: make room" in caplog.text
    assert all(damage(path) is None for path in folder.iterdir())
    if seen == "before it is written":
        assert [row["step"] for row in read_metrics(small_disk / "run", "event")] == [4]
        assert [row["step"] for row in read_metrics(small_disk / "run")] == [1, 2, 3, 4, 5, 6]
    other.unlink(missing_ok=True)
    close(run)
    again = run_of(arch, shards, folder=small_disk / "run")
    close(again)
    assert again.state.step == (6 if room_again else 2)


def one_of_two(folder: Path, shards: list[str]) -> None:
    """Rank 0 cannot write some of the checkpoints, first of all the last of a run."""
    monkeypatch = pytest.MonkeyPatch()
    with distributed("cpu") as env:
        for fails_at in ((4, 6), (2,)):
            name = folder / f"run_{fails_at[0]}"
            run = runs.run_of(folder / "tiny.json", shards, "checkpoint.every=2", env=env, folder=name)
            writing_fails(monkeypatch, *(fails_at if env.is_main else ()))
            try:
                train(run)
            except CheckpointError as error:
                (name / f"rank_{env.rank}").write_text(str(error))
            env.barrier()


def test_ranks_stay_in_step(arch: Path, shards: list[str]) -> None:
    folder = arch.parent
    run_distributed(one_of_two, 2, folder, shards)
    for first, kept, faults in ((4, [2], 2), (2, [4, 6], 0)):
        run = folder / f"run_{first}"
        said = [path.read_text() for path in run.glob("rank_*")]
        assert len(said) == faults
        assert all("step_00000006" in words for words in said)
        assert names(run / "checkpoints") == [f"step_{step:08d}" for step in kept]
        assert [row["step"] for row in read_metrics(run, "event")] == [first]


def save_without_end(folder: Path, state: TrainState) -> None:
    """Goes on from the newest checkpoint, if it is all of one step, and saves and removes until it is killed."""
    checkpoints = saver(folder)
    if (path := newest(folder)) is not None:
        load(path, state, ENV)
        assert values(state) == {state.step}
    while True:
        fill(state, state.step + 1)
        checkpoints.save(state, loader=LOADER, wait=False)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    chance, last = random.Random(0), 0
    state = filled_state(layers=8)  # before the fork: autograd has threads
    for _ in range(20):
        if (child := os.fork()) == 0:
            try:
                save_without_end(tmp_path, state)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it could not go on"
        whole = sorted(tmp_path.glob("step_*"))
        assert [damage(path) for path in whole] == [None] * len(whole)
        if whole:
            assert int(whole[-1].name.removeprefix("step_")) >= last
            last = int(whole[-1].name.removeprefix("step_"))
    assert last > 3, "too slow to have been killed in many places"
