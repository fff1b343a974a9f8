"""Grids of runs: what is finished stays, what was stopped goes on, what fails is told and loses nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import paper.grid
import pytest
from paper.grid import Grid, GridError, Job, Options, UnfinishedError, jobs_of, run_grid, settings_of

from clipq.config.checks import ConfigError

GRID = Grid(
    experiment="fig6_spikes",
    arms={"tiny": {"low, β2 0.9": ["optim.beta2=0.9"], "high": ["optim.lr=1e-2"]}},
    seeds={"tiny": 2},
)
RUN = """
import json, os, pathlib, signal, sys, time
folder, seconds, code, diverged, saving = pathlib.Path(sys.argv[1]), *map(float, sys.argv[2:])
folder.mkdir(parents=True, exist_ok=True)
begun = folder / "begun"
begun.write_text(str(int(begun.read_text()) + 1 if begun.exists() else 1))
(folder / "ready").touch()
asked = []

def stop(*_):
    asked.append(time.monotonic())
    if len(asked) > 1:
        os._exit(143)  # asked again: at once, with nothing saved
    time.sleep(saving)
    os._exit(75)

signal.signal(signal.SIGTERM, stop)
end = time.monotonic() + seconds
while time.monotonic() < end:
    time.sleep(0.01)
(folder / "config.yaml").write_text("steps: 4\\nwatch: {ignore: 0}\\n")
(folder / "environment.json").write_text(json.dumps({"device": "CPU", "torch": os.environ["OMP_NUM_THREADS"]}))
last = 2 if diverged else 4
steps = range(1, last + 1)
rows = [{"kind": "train", "step": n, "loss": 5.0 - n, "seconds": n, "images_per_second": 7.0} for n in steps]
rows += [{"kind": "event", "event": "bad step", "step": 2, "reason": "nan"}] if diverged else []
rows += [] if diverged else [{"kind": "eval", "step": 4, "task": "t", "metrics": {"top1": 0.5, "chance": 0.1}}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
print("the last line")
sys.exit(int(code))
"""


class Runs:
    """Stands in for clipq-train: what each run does, and how often it was begun."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds, self.saving, self.ends = path, 0.0, 0.0, {}
        self.commands: list[Job] = []

    def command_of(self, folder: Path, job: Job) -> list[str]:
        self.commands.append(job)
        code, diverged = self.ends.get(job.name, (0, 0))
        numbers = (self.seconds, code, diverged, self.saving)
        return [sys.executable, "-c", RUN, str(folder / job.name), *map(str, numbers)]

    def begun(self) -> dict[str, int]:
        return {p.parent.name: int(p.read_text()) for p in sorted(self.path.glob("tiny/fig6_spikes/*/begun"))}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs(tmp_path / "runs")
    monkeypatch.setattr(paper.grid, "command_of", found.command_of)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return found


def options(runs: Runs, **more: Any) -> Options:
    return Options(scale="tiny", runs=runs.path, **more)


NAMES = ["high-s0", "high-s1", "low_beta2_0_9-s0", "low_beta2_0_9-s1"]


def test_the_first_seed_of_all_arms_comes_first(runs: Runs) -> None:
    jobs = jobs_of(GRID, options(runs, overrides=("optim.eps=1",)))
    assert [job.name for job in jobs] == ["low_beta2_0_9-s0", "high-s0", "low_beta2_0_9-s1", "high-s1"]
    common = ("experiment=paper/fig6_spikes", "scale=tiny", "optim.eps=1")
    assert jobs[0].overrides == (*common, "optim.beta2=0.9", "seed=0")
    assert jobs[3].overrides == (*common, "optim.lr=1e-2", "seed=1")
    assert len(jobs_of(GRID, options(runs, seeds=5))) == 10


def test_finished_runs_are_not_run_again(runs: Runs) -> None:
    found = run_grid(GRID, options(runs, jobs=2))
    assert {arm: [r["seed"] for r in own] for arm, own in found.items()} == {"low, β2 0.9": [0, 1], "high": [0, 1]}
    assert found["high"][0]["loss"] == [4, 3, 2, 1]
    assert found["high"][0]["evaluations"]["t"][0]["top1"] == 0.5
    assert found["high"][0]["diverged"] is None
    assert run_grid(GRID, options(runs)) == found
    assert runs.begun() == dict.fromkeys(NAMES, 1)


def test_records_are_enough(runs: Runs, tmp_path: Path) -> None:
    """Moved to a machine that has no run folders."""
    found = run_grid(GRID, options(runs, jobs=4))
    moved = Runs(tmp_path / "moved")
    (moved.path / "tiny" / "fig6_spikes").mkdir(parents=True)
    (runs.path / "tiny" / "fig6_spikes" / "records").rename(moved.path / "tiny" / "fig6_spikes" / "records")
    assert run_grid(GRID, options(moved)) == found
    assert moved.begun() == {}


def test_a_record_of_other_settings_is_refused(runs: Runs) -> None:
    run_grid(GRID, options(runs, jobs=4))
    with pytest.raises(GridError, match=r"optim\.weight_decay: 0\.2 -> 0\.3"):
        run_grid(GRID, options(runs, overrides=("optim.weight_decay=0.3",)))
    for other in ("eval.tasks.shapes.templates=openclip:simple", "guard.policy=skip", "model.pretrained=x.pt"):
        with pytest.raises(GridError, match="is of other settings"):
            run_grid(GRID, options(runs, overrides=(other,)))
    run_grid(GRID, options(runs, overrides=("data.root=/elsewhere", "log.every=7", "device=cuda")))  # where and how


@pytest.mark.parametrize("override", ["optim.lr=1", "seed=3", "name=x", "optim.beta2=0.5"])
def test_what_arms_differ_in_cannot_be_set(override: str, runs: Runs) -> None:
    with pytest.raises(GridError, match=f"{override.partition('=')[0]}: leave it out"):
        run_grid(GRID, options(runs, overrides=(override,)))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_record_is_named(content: str, runs: Runs) -> None:
    records = runs.path / "tiny" / "fig6_spikes" / "records"
    records.mkdir(parents=True)
    (records / "high-s0.json").write_text(content)
    with pytest.raises(GridError, match=r"high-s0\.json is no record .*: remove it"):
        run_grid(GRID, options(runs))


def test_a_run_without_a_step_has_failed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory ran out in the first: its metrics are there, and empty."""
    without = RUN.replace('(folder / "metrics.jsonl").write_text(', '(folder / "metrics.jsonl").write_text("" and ')
    monkeypatch.setattr(sys.modules[__name__], "RUN", without)
    runs.ends = dict.fromkeys(NAMES, (1, 0))
    with pytest.raises(GridError, match="the last line") as told:
        run_grid(GRID, options(runs, jobs=2))
    assert str(told.value).count("exit code 1") == 4


def test_two_commands_do_not_share_runs(runs: Runs) -> None:
    runs.seconds = 30

    def first() -> None:
        with contextlib.suppress(UnfinishedError):
            run_grid(GRID, options(runs, minutes=0.04))

    thread = threading.Thread(target=first)
    thread.start()
    while not runs.begun():
        time.sleep(0.05)
    with pytest.raises(GridError, match="another process is at the runs of"):
        run_grid(GRID, options(runs))
    thread.join()


def test_runs_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, paper.grid as g\n"
        "p = subprocess.Popen(['sleep', '60'], preexec_fn=g._end_with_parent)\n"
        "print(p.pid, flush=True); p.wait()"
    )
    scripts = Path(paper.grid.__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=scripts)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().strip()
    assert child.exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while child.exists() and b"sleep" in _command_line(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"sleep" not in _command_line(child)


def test_a_failed_run_is_told_after_the_others_are_through(runs: Runs) -> None:
    runs.ends["low_beta2_0_9-s0"] = (1, 0)
    with pytest.raises(GridError, match=r"low_beta2_0_9-s0 \(exit code 1\): the last line"):
        run_grid(GRID, options(runs))
    assert runs.begun() == dict.fromkeys(NAMES, 1)
    runs.ends.clear()
    run_grid(GRID, options(runs))
    assert runs.begun() == dict.fromkeys(NAMES, 1) | {"low_beta2_0_9-s0": 2}


def test_a_wrong_setting_ends_the_grid(runs: Runs) -> None:
    runs.ends["low_beta2_0_9-s0"] = (2, 0)
    with pytest.raises(GridError, match="exit code 2"):
        run_grid(GRID, options(runs))
    assert runs.begun() == {"low_beta2_0_9-s0": 1}
    with pytest.raises(ConfigError, match="steps=0: expected 1 or more"):
        run_grid(GRID, options(runs, overrides=("steps=0",)))
    assert runs.begun() == {"low_beta2_0_9-s0": 1}


def test_a_run_that_diverged_is_a_result(runs: Runs) -> None:
    runs.ends["high-s1"] = (1, 1)
    found = run_grid(GRID, options(runs, jobs=4))
    assert [r["diverged"] for r in found["high"]] == [None, {"step": 2, "why": "nan"}]
    assert found["high"][1]["evaluations"] == {}


def test_time_is_up_and_the_same_command_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    finish = paper.grid._finish

    def noted(folder: Path, job: Job, code: int, watts: float | None = None) -> str | None:
        codes.append(code)
        return finish(folder, job, code, watts)

    monkeypatch.setattr(paper.grid, "_finish", noted)
    runs.seconds, runs.saving = 60, 1.0
    start = time.monotonic()
    with pytest.raises(UnfinishedError, match="4 of 4 runs are left"):
        run_grid(GRID, options(runs, jobs=2, minutes=2 / 60))
    assert time.monotonic() - start < 20
    assert codes == [75, 75], "asked once, however long they take to save"
    assert runs.begun() == {"high-s0": 1, "low_beta2_0_9-s0": 1}, "no other was begun when time was up"
    runs.seconds = 0
    run_grid(GRID, options(runs, jobs=2))
    assert runs.begun() == {"high-s0": 2, "high-s1": 1, "low_beta2_0_9-s0": 2, "low_beta2_0_9-s1": 1}


def test_an_interrupt_ends_the_runs_too(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.seconds = 60
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if len(list(runs.path.glob("*/*/*/ready"))) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(paper.grid.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_grid(GRID, options(runs, jobs=2))
    assert not [p for p in Path("/proc").glob("[0-9]*") if str(runs.path).encode() in _command_line(p)]


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_runs_beside_each_other_share_the_cores(runs: Runs) -> None:
    cores = len(os.sched_getaffinity(0))
    for together in (1, 4):
        found = run_grid(GRID, Options(scale="tiny", jobs=together, runs=runs.path / str(together)))
        assert {r["environment"]["torch"] for own in found.values() for r in own} == {str(max(1, cores // together))}


@pytest.mark.parametrize("together", [1, 2])
def test_power_is_read_of_a_run_that_is_alone(
    runs: Runs, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    asked = tmp_path / "asked"
    tool.write_text(f'#!/bin/sh\necho "$@" > {asked}\nwhile true; do echo 321.5; sleep 0.02; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    two_writes = RUN.replace(
        'print("the last line")', 'time.sleep(0.5); open(folder / "metrics.jsonl", "a").write("\\n")'
    )
    monkeypatch.setattr(sys.modules[__name__], "RUN", two_writes)
    found = run_grid(GRID, options(runs, jobs=together))
    watts = {r["watts"] for own in found.values() for r in own}
    assert watts == ({None} if together > 1 else {321.5})
    assert together > 1 or "-i 3" in asked.read_text()


def test_settings_tell_what_is_trained_and_not_where(runs: Runs) -> None:
    first, second = (jobs_of(GRID, options(runs, overrides=(o,)))[0] for o in ("data.root=/a", "data.root=/b"))
    assert settings_of(first) == settings_of(second)
    assert settings_of(first)["data.shards"] == "ROOT/train/*.tar"
    assert settings_of(first)["optim.beta2"] == 0.9
    assert not {"name", "runs", "log.every", "device"} & settings_of(first).keys()


def test_a_record_is_written_whole(runs: Runs) -> None:
    run_grid(GRID, options(runs, jobs=4))
    records = sorted((runs.path / "tiny" / "fig6_spikes" / "records").iterdir())
    assert [p.name for p in records] == [f"{name}.json" for name in NAMES]
    assert json.loads(records[0].read_text())["steps"] == 4


def test_signals_are_those_of_the_trainer() -> None:
    """A run that is killed before it can save is unfinished, not failed."""
    job = Job("a", 0, "a", ())
    for code in (-signal.SIGTERM, -signal.SIGINT, 143, 130, 75):
        assert paper.grid._finish(Path("/nowhere"), job, code) is None
    assert "exit code -9" in (paper.grid._finish(Path("/nowhere"), job, -9) or "")
