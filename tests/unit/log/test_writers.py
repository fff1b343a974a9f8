from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clipq.log.writers import JsonlWriter, TensorBoardWriter, WandbWriter

ROWS = [
    {"kind": "train", "step": s, "samples": 8 * s, "seconds": 0.5 * s, "loss": 1 / s, "grad_norm": None}
    for s in range(1, 6)
]
EVAL = {"kind": "eval", "step": 5, "samples": 40, "seconds": 2.5, "task": "shapes", "metrics": {"top1": 0.5}}


def test_resumed_file_is_as_if_never_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path, from_step=0)
    first.write(ROWS[:4])
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # a kill in the middle of a line
    second = JsonlWriter(path, from_step=2)
    second.write(ROWS[2:])
    second.write([EVAL])
    second.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*ROWS, EVAL]


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl", from_step=0)
    writer.write(ROWS[:1])
    assert (tmp_path / "m.jsonl").read_text().count("\n") == 1
    writer.close()


def test_non_finite_numbers_are_null(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl", from_step=0)
    writer.write([{"kind": "eval", "step": 1, "metrics": {"top1": float("nan")}, "loss": float("inf")}])
    writer.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "kind": "eval",
        "step": 1,
        "metrics": {"top1": None},
        "loss": None,
    }


def test_tensorboard_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardWriter(tmp_path, from_step=0)
    first.write([{**row, "loss": 99.0} for row in ROWS])
    first.close()
    second = TensorBoardWriter(tmp_path, from_step=3)
    second.write([*ROWS[3:], EVAL])
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = {e.step: e.value for e in events.Scalars("train/loss")}
    assert losses == pytest.approx({1: 99, 2: 99, 3: 99, 4: 1 / 4, 5: 1 / 5})
    assert [(e.step, e.value) for e in events.Scalars("eval/shapes/top1")] == [(5, 0.5)]
    assert "train/grad_norm" not in events.Tags()["scalars"]


@pytest.mark.slow
def test_wandb_keeps_its_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WANDB_SILENT", "true")
    ids = []
    for _ in range(2):
        writer = WandbWriter(tmp_path, mode="offline", project="p", entity=None, name="n", config={"a": 1})
        writer.write([*ROWS, EVAL])
        ids.append(writer._run.id)
        assert writer._run.summary["train/loss"] == pytest.approx(1 / 5)
        assert writer._run.summary["eval/shapes/top1"] == 0.5
        writer.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()


def test_trackers_are_imported_only_when_used() -> None:
    import subprocess
    import sys

    # timm imports wandb where it finds it; clipq itself has to do without
    code = "import sys; sys.modules['wandb'] = sys.modules['tensorboard'] = None; import clipq.build, clipq.cli.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
