import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipq.cli.report import main


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"kind": "train", "step": s, "samples": 8 * s, "seconds": float(s), "loss": 3 / s, "lr": 1e-3}
        for s in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_one_run_is_reported_in_its_own_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    target = Path(lines[-1])
    assert target == run.resolve() / "report" / "index.html"
    assert target.is_absolute()
    assert any(line.split()[:2] == ["final", "loss"] and line.endswith("1.0000") for line in lines)
    assert {p.name for p in target.parent.iterdir()} == {
        "index.html", "loss.png", "learning_rate.png", "summary.csv", "summary.md",
    }  # fmt: skip


def test_several_runs_are_reported_in_the_current_folder(tmp_path, capsys, monkeypatch):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(runs) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path.resolve() / "report" / "index.html")
    assert not (tmp_path / "a" / "report").exists()


def test_out_names_the_folder_and_a_second_report_replaces_the_first(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for _ in range(2):
        assert main([str(run), "--out", str(tmp_path / "deep" / "out")]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).parent == (tmp_path / "deep" / "out").resolve()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "clipq-report: absent does not exist: expected a run folder"),
        (["."], "clipq-report: . is not a run folder: it has no metrics.jsonl"),
        (["empty"], "clipq-report: empty has no training rows yet"),
        (["run", "--out", "file"], "clipq-report: file: File exists"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(tmp_path, capsys, monkeypatch, arguments, message):
    write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["run", "--color"]])
def test_wrong_usage_gives_one_line_and_status_2(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_starts_light_and_survives_a_plain_terminal(tmp_path):
    """In a process of its own: neither torch nor OpenCLIP is imported, and ASCII output is no error."""
    run = write_run(tmp_path / "名前")
    code = (
        "import sys; from clipq.cli.report import main\n"
        f"status = main([{str(run)!r}])\n"
        "heavy = {'torch', 'open_clip', 'hydra', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr


def test_help_has_an_example_and_imports_nothing_big():
    code = (
        "import sys; from clipq.cli.report import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: print({'numpy', 'matplotlib', 'torch'} & set(sys.modules), done.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "clipq-report runs/my-run" in done.stdout
    assert done.stdout.splitlines()[-1] == "set() 0"
