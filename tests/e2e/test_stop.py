"""Real signals to real trainers, of one rank and of two: what was trained is saved, no traceback, no process left, and
the same command makes the run that it would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest
import torch
from safetensors.torch import load_file

from clipq.dist.stop import SAME
from tests.helpers import free_port, read_metrics, start_ranks, steps_done

STEPS = 60
SECONDS = 60
"""That anything here may take. A trainer starts in 5, and ends in 1 or 2 after what it has to do."""


def settings(world: Path, name: str, *more: str) -> list[str]:
    return [
        *(f"model.name={world}/tiny.json", f"data.shards={world}/data/*.tar", "data.workers=1", "data.shuffle=16"),
        *("data.lanes=2", "batch_size=16", f"steps={STEPS}", "schedule.warmup=5", "optim.lr=1e-3", "backend=fp32"),
        *("log.every=7", "checkpoint.every=0", f"name={name}", *more),
    ]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def ended(processes: list[subprocess.Popen], world: Path) -> tuple[list[int], str]:
    """Exit codes and what was said, when nothing is left of the processes' groups."""
    codes = [process.wait(timeout=SECONDS) for process in processes]
    for process in processes:
        wait_for(lambda process=process: not group_lives(process.pid), "a process was left behind")
    said = (world / "output").read_text()
    assert "Traceback" not in said, said
    return codes, said


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("*")) if folder.exists() else []


def finished(world: Path, name: str, ranks: int, *more: str) -> Path:
    codes, said = ended(start_ranks(world, settings(world, name, *more), ranks), world)
    assert codes == [0] * ranks, said
    return world / "runs" / name


@pytest.fixture(scope="module")
def whole(world: Path) -> Callable[[int], Path]:
    """Number of ranks -> the folder of a run that is left alone."""
    made: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = finished(world, f"whole_{ranks}", ranks)
        return made[ranks]

    return of


def same_run(ours: Path, theirs: Path) -> None:
    rows = [[(r["step"], r["samples"], r["loss"], r["grad_norm"]) for r in read_metrics(f)] for f in (ours, theirs)]
    assert rows[0] == rows[1]
    last = f"checkpoints/step_{STEPS:08}/model.safetensors"
    one, two = load_file(ours / last), load_file(theirs / last)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


CASES = [
    pytest.param(1, SIGTERM, "everyone", 75, id="a-scheduler"),
    pytest.param(1, SIGINT, "everyone", -SIGINT, marks=pytest.mark.slow, id="ctrl-c"),
    pytest.param(2, SIGUSR1, "one rank", 75, marks=pytest.mark.slow, id="one-rank"),
    pytest.param(2, SIGINT, "everyone", -SIGINT, marks=pytest.mark.slow, id="ctrl-c-two-ranks"),
]


@pytest.mark.parametrize(("ranks", "number", "to", "code"), CASES)
def test_stopped_and_gone_on(
    ranks: int, number: signal.Signals, to: str, code: int, world: Path, whole: Callable[[int], Path]
) -> None:
    """Loader processes get it too, as they do from a terminal, and twice within a moment, as where a launcher is."""
    expected = whole(ranks)
    name = f"stopped_{ranks}_{number.name}_{to.replace(' ', '_')}"
    folder = world / "runs" / name
    processes = start_ranks(world, settings(world, name), ranks)
    wait_for(lambda: steps_done(folder) >= 7, "it does not begin")
    for _ in range(2):
        for process in processes if to == "everyone" else processes[-1:]:
            (os.killpg if to == "everyone" else os.kill)(process.pid, number)
        time.sleep(0.05)
    codes, said = ended(processes, world)
    assert codes == [code] * ranks, said
    step = len(read_metrics(folder))
    assert 7 <= step < STEPS, "the signal came too late to show anything"
    assert checkpoints(folder) == [f"step_{step:08}"]
    by = number.name if to == "everyone" else "a signal to another rank"
    line = f"{by}: the run ended after step {step}, saved in runs/{name}/checkpoints/step_{step:08}; the same command"
    assert said.count(line) == 1
    assert all(f"after step {step}" in log.read_text() for log in (folder / "logs").iterdir())
    finished(world, name, ranks)
    same_run(folder, expected)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_before_the_first_step(ranks: int, world: Path) -> None:
    """While the model is built; of two ranks one is told."""
    name = f"early_{ranks}"
    logs = world / "runs" / name / "logs"
    processes = start_ranks(world, settings(world, name), ranks)
    wait_for(lambda: (logs / f"rank_{ranks - 1}.log").exists(), "it does not begin")
    os.kill(processes[-1].pid, SIGTERM)
    codes, said = ended(processes, world)
    assert codes == [75] * ranks, said
    assert said.count("the run ended before its first step; the same command goes on") == 1
    assert checkpoints(world / "runs" / name) == []


@pytest.mark.slow
def test_as_soon_as_signals_are_handled(world: Path) -> None:
    """Before torch is imported."""
    (process,) = processes = start_ranks(world, settings(world, "at_once"), 1)
    status, bit = Path(f"/proc/{process.pid}/status"), 1 << (SIGUSR1 - 1)
    wait_for(lambda: bool(int(status.read_text().split("SigCgt:")[1].split()[0], 16) & bit), "it handles none")
    process.send_signal(SIGINT)
    codes, _ = ended(processes, world)
    assert codes == [-SIGINT]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_in_an_evaluation(ranks: int, world: Path, whole: Callable[[int], Path]) -> None:
    """It is broken off, its step is saved, and the resumed run begins with it."""
    name = f"evaluating_{ranks}"
    folder, data = world / "runs" / name, world / "data"
    files = {"shards": "*.tar", "classnames": "classnames.txt", "templates": "templates.txt"}
    task = [f"eval.tasks.zero_shot.{k}={data}/{v}" for k, v in files.items()]
    evaluation = ("eval=zero_shot", "eval.every=5", "eval.workers=1", "eval.batch_size=1", *task)
    processes = start_ranks(world, settings(world, name, *evaluation), ranks)
    wait_for(lambda: steps_done(folder) >= 5, "it does not begin")
    os.kill(processes[-1].pid, SIGTERM)
    codes, said = ended(processes, world)
    assert codes == [75] * ranks, said
    assert checkpoints(folder) == ["step_00000005"]
    assert read_metrics(folder, "eval") == []
    finished(world, name, ranks, *evaluation, "eval.batch_size=64", "eval.every=20")
    same_run(folder, whole(ranks))


@pytest.mark.slow
def test_while_it_waits_for_data(world: Path, whole: Callable[[int], Path]) -> None:
    """Its loader process stands still, and does not keep it from ending."""
    folder = world / "runs" / "waiting"
    (process,) = processes = start_ranks(world, settings(world, "waiting"), 1)
    wait_for(lambda: steps_done(folder) >= 7, "it does not begin")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    time.sleep(2)  # the batches that are ready are used up
    assert process.poll() is None
    process.send_signal(SIGTERM)
    codes, said = ended(processes, world)
    assert codes == [75], said
    assert len(read_metrics(folder)) < STEPS
    assert checkpoints(folder) == [f"step_{len(read_metrics(folder)):08}"]
    finished(world, "waiting", 1)
    same_run(folder, whole(1))


@pytest.mark.slow
def test_the_second_signal_ends_at_once(world: Path) -> None:
    """Even where the first cannot be heard: this rank waits for one that stands still."""
    folder = world / "runs" / "second"
    processes = start_ranks(world, settings(world, "second"), 2)
    wait_for(lambda: steps_done(folder) >= 7, "it does not begin")
    first, second = processes
    second.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    first.send_signal(SIGUSR1)
    first.send_signal(SIGTERM)
    time.sleep(SAME + 1)
    assert first.poll() is None
    first.send_signal(SIGTERM)
    assert first.wait(timeout=2) == 128 + SIGTERM
    second.kill()
    _, said = ended(processes, world)
    assert "SIGTERM once more: ended at once" in said
    assert checkpoints(folder) == []


@pytest.mark.slow
def test_a_launcher_is_told(world: Path, whole: Callable[[int], Path]) -> None:
    """torchrun passes SIGTERM on; the traceback that it prints is its own."""
    folder = world / "runs" / "launched"
    with (world / "output").open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
                *("--master_port", str(free_port()), "-m", "clipq.cli.train", *settings(world, "launched")),
            ],
            cwd=world,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_for(lambda: steps_done(folder) >= 7, "it does not begin")
    process.send_signal(SIGTERM)
    assert process.wait(timeout=SECONDS) != 0
    said = (world / "output").read_text()
    assert said.count("the run ended after step") == 1, said
    assert checkpoints(folder) == [f"step_{len(read_metrics(folder)):08}"]
    finished(world, "launched", 2)
    same_run(folder, whole(2))
