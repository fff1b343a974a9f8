"""Synthetic run folders, written as the contract of a run folder says and not by the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def train_row(step: int, *, batch: int = 64, loss: float | None = None, log_every: int = 5) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": "train",
        "step": step,
        "samples": batch * step,
        "seconds": 1.0 + 0.25 * step,
        "loss": 4.0 / step**0.3 if loss is None else loss,
        "lr": 1e-3 * min(1, step / 10),
        "logit_scale": 14.3 + 0.01 * step,
        "grad_norm": 1.0 + 1 / step,
    }
    if step % log_every == 0:
        row |= {
            "images_per_second": 200.0 + (step * 7) % 23,
            "data_wait": 0.02 + (step % 4) / 50,
            "memory_gib": 1.5 + (step % 3) / 10,
            "mfu": None,
        }
    return row


def eval_row(step: int, task: str, metrics: dict[str, float]) -> dict[str, Any]:
    seconds = 1.0 + 0.25 * step
    return {
        "kind": "eval",
        "step": step,
        "samples": 64 * step,
        "seconds": seconds,
        "task": task,
        "metrics": metrics,
    }


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    def write(
        name: str = "run",
        rows: list[dict[str, Any]] | None = None,
        *,
        tail: str = "",
        config: str | None = None,
        environment: dict[str, Any] | None = None,
        examples: dict[str, list[dict[str, Any]]] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = [train_row(step) for step in range(1, 41)] if rows is None else rows
        text = "".join(json.dumps(row) + "\n" for row in rows) + tail
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        if config is not None:
            (folder / "config.yaml").write_text(config, encoding="utf-8")
        if environment is not None:
            (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        for task, items in (examples or {}).items():
            (folder / "examples").mkdir(exist_ok=True)
            value = {"task": task, "step": 40, "kind": "zero_shot", "examples": items}
            (folder / "examples" / f"{task}.json").write_text(json.dumps(value), encoding="utf-8")
        return folder

    return write
