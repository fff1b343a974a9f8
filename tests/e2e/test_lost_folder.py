"""A machine is lost with the folder of its run: the same command on another one goes on from the uploaded copy."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from clipq.train.upload import RemoteRun
from tests.helpers import read_metrics, start_ranks, steps_done


def settings(world: Path, name: str, *more: str) -> list[str]:
    return [
        *(f"model.name={world}/tiny.json", f"data.shards={world}/data/*.tar", "data.workers=1", "data.lanes=2"),
        *("batch_size=16", "steps=12", "schedule.warmup=2", "backend=fp32", "log.every=1", "checkpoint.every=3"),
        *(f"name={name}", *more),
    ]


def codes_and_words(world: Path, settings: list[str], ranks: int) -> tuple[list[int], str]:
    codes = [process.wait(timeout=120) for process in start_ranks(world, settings, ranks)]
    return codes, (world / "output").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_run_elsewhere(ranks: int, world: Path) -> None:
    codes, said = codes_and_words(world, settings(world, f"whole_{ranks}"), ranks)
    assert codes == [0] * ranks, said
    whole = [row["loss"] for row in read_metrics(world / "runs" / f"whole_{ranks}")]

    folder, there = world / "runs" / f"lost_{ranks}", RemoteRun(f"file://{world}/there/lost_{ranks}")
    command = settings(world, folder.name, f"checkpoint.upload=file://{world}/there")
    processes = start_ranks(world, command, ranks)
    while not there.checkpoints():
        assert all(process.poll() is None for process in processes), (world / "output").read_text()
        time.sleep(0.01)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert steps_done(folder) >= 3
    shutil.rmtree(folder)

    codes, said = codes_and_words(world, command, ranks)
    assert codes == [0] * ranks, said
    assert said.count("fetched step_000000") == 1
    assert f"resumed from runs/{folder.name}/checkpoints/step_000000" in said
    rows = read_metrics(folder)
    assert [row["loss"] for row in rows] == whole
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert there.checkpoints()[-1] == "step_00000012", "the end of a run waits for its last upload"

    shutil.rmtree(folder)
    codes, said = codes_and_words(world, [*command, "resume=never"], ranks)
    assert codes == [2] * ranks
    assert f"resume=never, but file://{world}/there/lost_{ranks} holds step_00000012" in said


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("runs", "expected a folder that can be written by fsspec, as s3://bucket/runs"),
        ("http://localhost/runs", "expected a folder that can be written by fsspec"),
        ("s4://bucket/runs", "Protocol not known: s4"),
        ("file:///proc/runs", "No such file or directory: '/proc/runs"),
    ],
)
def test_what_cannot_be_written_is_told_first(address: str, says: str, world: Path) -> None:
    codes, said = codes_and_words(world, settings(world, "early", f"checkpoint.upload={address}"), 1)
    assert codes == [2], said
    assert f"checkpoint.upload={address}: " in said
    assert says in said
    assert "Traceback" not in said
    assert not list((world / "runs" / "early" / "checkpoints").glob("*"))


def test_failed_uploads_cost_no_training(world: Path) -> None:
    place = world / "broken"
    (place / "goes_on").mkdir(parents=True)
    (place / "goes_on" / "checkpoints").write_text("a file, where a folder should be")
    codes, said = codes_and_words(world, settings(world, "goes_on", f"checkpoint.upload=file://{place}"), 1)
    assert codes == [1], "what was asked for was not done"
    rows = read_metrics(world / "runs" / "goes_on", kind="event")
    assert rows
    assert {row["event"] for row in rows} == {"failed upload"}
    assert len(read_metrics(world / "runs" / "goes_on")) == 12
    assert "the run is whole in runs/goes_on, and the same command tries again" in said

    (place / "goes_on" / "checkpoints").unlink()
    codes, said = codes_and_words(world, settings(world, "goes_on", f"checkpoint.upload=file://{place}"), 1)
    assert codes == [0], said
    assert RemoteRun(f"file://{place}/goes_on").checkpoints()[-1] == "step_00000012"
