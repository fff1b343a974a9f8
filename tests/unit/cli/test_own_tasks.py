"""clipq-eval without eval=: which tasks a checkpoint brings, and why it brings none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clipq.cli.checkpoints import with_tasks
from clipq.config.checks import ConfigError
from clipq.config.evaluation import EvalConfig, TaskConfig

TASKS = {"mine": {"shards": "test/*.tar", "classnames": "names.txt", "templates": "t.txt"}}


def run_of(folder: Path, content: Any) -> str:
    """A run with one checkpoint, both of this configuration."""
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").touch()
    for place in (folder, checkpoint):
        (place / "config.yaml").write_text(yaml.safe_dump(content))
    return str(folder)


def test_a_run_and_a_checkpoint_bring_their_own(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", {"eval": {"root": "test", "tasks": TASKS, "batch_size": 7}})
    for checkpoint in (run, f"{run}/checkpoints/step_00000004", f"{run}/checkpoints/step_00000004/model.safetensors"):
        found = with_tasks(EvalConfig(batch_size=3), checkpoint)
        assert found.tasks["mine"].classnames == "names.txt"
        assert found.batch_size == 3, "how it is evaluated is the command's"
    named = EvalConfig(tasks={"x": TaskConfig(shards="a.tar", classnames="n.txt", templates="t.txt")})
    assert with_tasks(named, run) is named


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eval": {"tasks": {}}}, "config.yaml has none either"),
        ({"eval": {"tasks": 3}}, "config.yaml: ValidationError"),
        ({}, "config.yaml: KeyError"),
    ],
)
def test_why_it_brings_none(content: Any, message: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", content)
    with pytest.raises(ConfigError, match="eval has no tasks: choose a data set") as told:
        with_tasks(EvalConfig(), run)
    assert message in str(told.value)


def test_what_cannot_bring_any(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", {"eval": {"tasks": TASKS}})
    for checkpoint, root, message in (
        (f"{tmp_path}/no", None, "/no: no such file or folder"),
        (f"{tmp_path}/*", None, "only one checkpoint by its own name"),
        ([run], None, "only one checkpoint by its own name"),
        (run, "/elsewhere", "eval.root=/elsewhere: eval has no tasks"),
    ):
        with pytest.raises(ConfigError) as told:
            with_tasks(EvalConfig(root=root), checkpoint)
        assert message in str(told.value)
