"""scripts/reproduce.py on a CPU: every figure at its smallest, a grid that is stopped and goes on, wrong arguments."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipq.report.figure import read_figure, write_figure

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce.py"
sys.path.insert(0, str(SCRIPT.parent))
import reproduce  # noqa: E402
from paper.figures import FIGURES  # noqa: E402


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


@pytest.mark.slow
def test_every_figure_is_made(tmp_path: Path) -> None:
    subprocess.run(command("all", "scale=tiny", "jobs=2", "runs=r"), cwd=tmp_path, check=True, timeout=580)
    figures = tmp_path / "r" / "tiny" / "figures"
    assert sorted(p.stem for p in figures.glob("*.json")) == sorted(FIGURES)
    for path in sorted(figures.glob("*.json")):
        content = read_figure(path)
        assert content["scale"] == "tiny"
        assert content["environment"]["device"].startswith("CPU")
        assert content["command"] == f"scripts/reproduce.py {path.stem} scale=tiny"
        assert content["table"]["rows"]
        assert any(v is not None for panel in content["panels"] for s in panel["series"] for v in s["y"])
        write_figure(path, tmp_path / "again")
        for suffix in (".png", ".md"):
            again = tmp_path / "again" / f"{path.stem}{suffix}"
            assert again.read_bytes() == path.with_suffix(suffix).read_bytes()
    losses = json.loads((figures / "fig2.json").read_text())["panels"]
    assert all(len(s["y"]) == 6 and s["y"][0] != s["y"][-1] for panel in losses for s in panel["series"])


@pytest.mark.slow
def test_a_stopped_grid_goes_on(tmp_path: Path) -> None:
    arguments = command("fig6", "scale=tiny", "runs=r", "steps=12", "checkpoint.every=2")
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "r" / "tiny" / "fig6_spikes"
    deadline = time.monotonic() + 120
    while not list(first.glob("*/checkpoints/step_*")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert len(list(first.glob("records/*.json"))) < 2
    subprocess.run(arguments, cwd=tmp_path, check=True, timeout=300)
    records = [json.loads(p.read_text()) for p in sorted(first.glob("records/*.json"))]
    assert [r["steps"] for r in records] == [12, 12]
    rows = [json.loads(line) for p in first.glob("*/metrics.jsonl") for line in p.read_text().splitlines()]
    assert [row["kind"] for row in rows].count("resume") == 1, "the run that was stopped went on, the other began"
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*.jsonl")}
    subprocess.run(arguments, cwd=tmp_path, check=True, timeout=120)
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*.jsonl")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig12"], "fig12: no such figure: there are fig1, fig2"),
        (["fig1", "scale=big"], "scale=big: expected one of tiny, small, paper"),
        (["fig1", "seeds=x"], "seeds=x: expected a number"),
        (["fig1", "runs=r"], "fig1: data.root is not set. It is: "),
        (["fig8", "runs=r"], "data.root is not set: expected the folder of Tiny ImageNet"),
        (["fig8", "runs=r", "data.root=/no"], "/no/train/*.tar.gz"),
        (["fig1", "seeds=0"], "seeds=0: expected more than 0"),
        (["fig1", "jobs=-1"], "jobs=-1: expected more than 0"),
        (["fig1", "launcher=x", "minutes=3"], "launcher= with minutes="),
        (["fig1", "run=x"], "fig9 alone takes a run"),
        (["fig9", "scale=tiny", "run=no"], "no has no checkpoint"),
        (["fig1", "scale=tiny", "runs=r", "backend=bf16"], "backend=bf16: the runs of this figure differ in backend"),
        (["fig1", "scale=tiny", "runs=r", "optim.lrr=1"], "fig1: optim.lrr: no such setting. Did you mean optim.lr?"),
    ],
)
def test_wrong_arguments_are_told_at_once(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        assert reproduce.main() in (1, 2)
        told = capsys.readouterr().err
    except SystemExit as end:
        told = str(end.code)
    assert message in told
    assert not list(tmp_path.rglob("*.log"))
