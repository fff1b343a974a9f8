"""Where metrics go: metrics.jsonl always; TensorBoard and Weights & Biases where configured."""

from __future__ import annotations

import inspect
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from clipq.config.checks import require

Row = dict[str, Any]
"""One metrics row: `kind` is train, eval, resume or event; always a `step`."""


class Writer(Protocol):
    def write(self, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


def scalars(row: Row) -> dict[str, float]:
    """Tag -> value of the numbers in a row, as trackers name them: `train/loss`, `eval/<task>/top1`."""
    if row["kind"] == "eval":
        return {f"eval/{row['task']}/{name}": v for name, v in row["metrics"].items()}
    skip = ("kind", "step", "samples")
    numbers: dict[str, float] = {
        f"{row['kind']}/{k}": v for k, v in row.items() if k not in skip and isinstance(v, (int, float))
    }
    nested = {kind: values for kind, values in row.items() if isinstance(values, dict)}
    return numbers | {f"{kind}/{name}": value for kind, values in nested.items() for name, value in values.items()}


class JsonlWriter:
    """Appends rows to metrics.jsonl, a JSON object a line. Non-finite numbers are written as null.

    Args:
        from_step: rows of later steps are removed first: a resumed run writes them again.
    """

    def __init__(self, path: Path, *, from_step: int) -> None:
        self._path = path
        if path.exists():
            self._cut(from_step)
        self._file = path.open("a", encoding="utf-8")

    def _cut(self, step: int) -> None:
        kept = [line for line, row in _lines(self._path) if row["step"] <= step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        part.replace(self._path)

    def write(self, rows: Sequence[Row]) -> None:
        self._file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def evaluated(path: Path, step: int) -> set[str]:
    """Tasks of which a metrics.jsonl holds the evaluation after this step."""
    if not path.exists():
        return set()
    return {row["task"] for _, row in _lines(path) if row["kind"] == "eval" and row["step"] == step}


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """The lines of a metrics.jsonl, each as it is and read."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield line, json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardWriter:
    """TensorBoard events in `folder`; those after `from_step` are hidden when a run resumes."""

    def __init__(self, folder: Path, *, from_step: int) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # imports TensorFlow's protocol buffers: only when used

        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for tag, value in scalars(row).items():
                self._writer.add_scalar(tag, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def check_wandb_login() -> None:
    """Finds a missing key before anything is built; nothing is asked of the network.

    Raises:
        ConfigError: there is none in the environment, in wandb's settings or in .netrc.
    """
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        found = wandb.login(prompt=False, verify=False)
    else:
        found = wandb.api.api_key is not None
    require(
        found,
        "log.wandb=online: no API key of Weights & Biases was found: run `wandb login`, set WANDB_API_KEY, or choose "
        "log.wandb=offline",
    )


class WandbWriter:
    """A Weights & Biases run. Its id lies in the run folder, so that a resumed run goes on in the same one."""

    def __init__(
        self, folder: Path, *, mode: str, project: str, entity: str | None, name: str, config: dict[str, Any]
    ) -> None:
        import wandb  # starts a service process and reads the network: only when used

        id_file = folder / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
        id_file.write_text(run_id)
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            project=project,
            entity=entity,
            name=name,
            dir=str(folder),
            config=config,
        )
        # A resumed run repeats steps after its checkpoint; with a step metric of our own they are not refused.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"step": row["step"], **scalars(row)})

    def close(self) -> None:
        self._run.finish()
