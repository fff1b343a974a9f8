"""A run that is asked to end, at a step that the test chooses: what is saved, and that the resumed run is the same."""

from __future__ import annotations

import math
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch

from clipq.dist.env import distributed
from clipq.dist.stop import Stop, Stopped
from clipq.train.kept import newest
from clipq.train.loop import train
from clipq.train.run import DivergedError, Run
from tests.helpers import read_metrics, run_distributed
from tests.unit.train import runs
from tests.unit.train.test_guard import NAN, at_step, spoil


def run_of(arch: Path, shards: list[str], *overrides: str, folder: str) -> Run:
    with distributed("cpu") as env:
        return runs.run_of(arch, shards, "steps=12", "log.every=4", *overrides, env=env, folder=Path(folder))


def ask_at(run: Run, step: int) -> None:
    """Asks the run to end while it is in a step."""

    def hook(*_: Any) -> None:
        if run.state.step + 1 == step:
            run.stop.asked = SIGTERM

    run.model.register_forward_hook(hook)


def stopped_at(run: Run, step: int) -> Stopped:
    ask_at(run, step)
    with pytest.raises(Stopped) as stopped:
        train(run)
    return stopped.value


def numbers(folder: str) -> list[tuple]:
    return [tuple(row[k] for k in ("step", "samples", "loss", "grad_norm")) for row in read_metrics(Path(folder))]


def test_it_is_saved_after_the_step_and_goes_on_as_if_nothing_had_been(arch: Path, shards: list[str]) -> None:
    whole = run_of(arch, shards, folder="whole")
    train(whole)
    stopped = stopped_at(run_of(arch, shards, folder="run"), 6)
    assert stopped.code == 75
    assert str(stopped) == (
        "SIGTERM: the run ended after step 6, saved in run/checkpoints/step_00000006; the same command goes on"
    )
    assert numbers("run") == numbers("whole")[:6], "what was pending is written"
    resumed = run_of(arch, shards, folder="run")
    assert resumed.state.step == 6
    train(resumed)
    assert numbers("run") == numbers("whole")
    for (name, ours), theirs in zip(
        resumed.state.model.named_parameters(), whole.state.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_step_that_is_saved_is_not_saved_again(
    arch: Path, shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stopped_at(run_of(arch, shards, "checkpoint.every=6", folder="run"), 6)
    assert caplog.text.count("saved run/checkpoints/step_00000006") == 1


def test_the_last_step_ends_a_run_that_is_done(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, folder="run")
    ask_at(run, 12)
    train(run)
    assert newest(Path("run/checkpoints")) == Path("run/checkpoints/step_00000012")


def test_asked_before_training(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, folder="run")
    run.stop.asked = SIGTERM
    with pytest.raises(Stopped, match="before its first step"):
        train(run)
    assert newest(Path("run/checkpoints")) is None


def test_the_guards_bound_is_that_of_the_run_left_alone(arch: Path, shards: list[str]) -> None:
    """It learns when numbers are due to be read, not when they are read because the run ends."""

    def bounds(run: Run) -> list[float]:
        seen: list[float] = []
        run.model.register_forward_pre_hook(lambda *_: seen.append(run.guard.bound))
        return seen

    settings = ("guard.rise=3", "watch.ignore=1")
    whole = run_of(arch, shards, *settings, folder="whole")
    expected = bounds(whole)
    train(whole)
    first = run_of(arch, shards, *settings, folder="run")
    found = bounds(first)
    stopped_at(first, 6)
    second = run_of(arch, shards, *settings, folder="run")
    more = bounds(second)
    train(second)
    assert found + more == expected
    assert math.isfinite(expected[6])
    assert expected[6] != expected[8]


def test_bad_steps_are_not_saved_before_the_guard_has_gone_back(arch: Path, shards: list[str]) -> None:
    """The resumed run comes to them again, and goes back from where the run left alone does."""
    settings = ("guard.policy=rewind", "guard.limit=2", "checkpoint.every=4", "schedule=constant")
    seen = []
    for folder in ("whole", "run"):
        run = run_of(arch, shards, *settings, folder=folder)
        spoil(run, NAN, at_step(run, 6))
        if folder == "run":
            assert "from which it is to go back to run/checkpoints/step_00000004" in str(stopped_at(run, 7))
            run = run_of(arch, shards, *settings, folder=folder)
            spoil(run, NAN, at_step(run, 6))
        with pytest.raises(DivergedError, match=r"as often as guard\.limit"):  # step 6 is bad again and again
            train(run)
        seen.append([(e["event"], e["step"], e.get("to")) for e in read_metrics(Path(folder), "event")])
    assert seen[0] == seen[1]
    assert ("rewind", 8, 4) in seen[0]


@pytest.mark.parametrize("evaluation", ["zero_shot", "retrieval"])
def test_an_evaluation_is_broken_off_and_owed(evaluation: str, arch: Path, shards: list[str]) -> None:
    """Where the step is not saved yet, it is then."""
    task = {
        "zero_shot": [
            f"eval.tasks.zero_shot.classnames={Path(shards[0]).parent}/classnames.txt",
            f"eval.tasks.zero_shot.templates={Path(shards[0]).parent}/templates.txt",
            f"eval.tasks.zero_shot.shards=[{','.join(shards)}]",
        ],
        "retrieval": [
            f"eval.tasks.retrieval.shards=[{','.join(shards)}]",
        ],
    }[evaluation]
    settings = (f"eval={evaluation}", *task, "eval.every=5", "eval.workers=0", "eval.batch_size=4")
    run = run_of(arch, shards, *settings, folder="run")
    calls = []

    def ask(*_: Any) -> None:
        if not run.state.model.training:
            calls.append(1)
            if len(calls) == 3:
                run.stop.asked = SIGTERM

    run.state.model.get_submodule("visual").register_forward_hook(ask)
    with pytest.raises(Stopped, match="after step 5, saved in run/checkpoints/step_00000005"):
        train(run)
    assert len(calls) == 3
    assert run.state.model.training
    assert read_metrics(Path("run"), "eval") == []
    train(run_of(arch, shards, *settings, folder="run"))
    assert [row["step"] for row in read_metrics(Path("run"), "eval")] == [5, 10, 12]


def one_of_two(folder: str, shards: list[str]) -> None:
    with distributed("cpu") as env:
        run = runs.run_of(
            Path(folder) / "tiny.json", shards, "steps=12", "log.every=4", env=env, folder=Path(folder) / "run"
        )
        if env.rank == 1:
            ask_at(run, 5)
        with pytest.raises(Stopped) as stopped:
            train(run)
        Path(folder, f"rank_{env.rank}").write_text(f"{run.state.step} {stopped.value.by}")


def test_all_ranks_end_after_the_same_step(arch: Path, shards: list[str]) -> None:
    run_distributed(one_of_two, 2, str(arch.parent), shards)
    assert [(arch.parent / f"rank_{r}").read_text() for r in range(2)] == ["6 None", "6 15"]
    assert newest(arch.parent / "run" / "checkpoints") == arch.parent / "run" / "checkpoints" / "step_00000006"


def test_what_may_be_broken_off() -> None:
    stop = Stop()
    with stop.breaks_off(allowed=True):
        assert stop.at_once
    assert not stop.at_once
    with pytest.raises(Stopped), stop.breaks_off(allowed=True):
        stop.note(SIGTERM, None)
    stop.note(SIGTERM, None)
    with pytest.raises(Stopped), stop.breaks_off(allowed=True):
        raise AssertionError("it was asked before")
    with stop.breaks_off(allowed=False):
        stop.note(SIGTERM, None)


@pytest.mark.gpu
def test_what_the_gpu_sums_is_read_a_step_later() -> None:
    stop = Stop()
    for askers in (0.0, 0.0, 1.0):
        stop.hear(torch.full((2,), askers, device="cuda")[1])
        stop.agree_late()
    stop.hear(torch.zeros((), device="cuda"))
    with pytest.raises(Stopped):
        stop.agree_late()
