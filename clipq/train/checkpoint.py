"""Checkpoints of a run: when they are due, how they are written, which are kept, how a run finds its newest.

A checkpoint is a folder `step_00001000` with `model.safetensors` (OpenCLIP's keys, loadable by OpenCLIP as it is),
`open_clip_config.json` (the architecture), `state.pt` (optimizer, generators, counters) and `config.yaml`. It is
written under another name, flushed to the disk and renamed: a folder with the right name is complete, whenever the
process is killed.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from clipq.dist.env import DistEnv
from clipq.dist.gather import raised_on_every_rank
from clipq.model.weights import CONFIG_FILE, WeightsError, load_openclip, read_weights, save_weights
from clipq.optim.shards import gathered
from clipq.train.state import TrainState

log = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d{8})")


class CheckpointError(OSError):
    """A checkpoint cannot be written; those before it are untouched."""


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a folder of checkpoints; None where there is none."""
    found = sorted(p for p in folder.glob("step_*") if NAME.fullmatch(p.name))
    return found[-1] if found else None


class Checkpoints:
    """The folder of checkpoints of a run.

    Args:
        every: steps between two checkpoints; 0 for none but the last.
        minutes: minutes between two checkpoints, whichever comes first; 0 for none.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints kept for good: those whose step is a multiple of it; 0 for none.
        config: the resolved configuration, written into each checkpoint.
        architecture: the model's as OpenCLIP's JSON, written into each checkpoint: a file it came from may go.
    """

    def __init__(
        self,
        folder: Path,
        env: DistEnv,
        *,
        every: int,
        minutes: float,
        keep_last: int,
        keep_every: int,
        config: str,
        architecture: str,
    ) -> None:
        self.folder = folder
        self._env = env
        self._every, self._minutes = every, minutes
        self._keep_last, self._keep_every = keep_last, keep_every
        self._config, self._architecture = config, architecture
        self._saved_at = time.monotonic()
        if env.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".part_*"):
                shutil.rmtree(leftover)

    def newest(self) -> Path | None:
        return newest(self.folder)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def due(self, step: int, *, ask_clock: bool) -> bool:
        """Whether to save after this step. Collective where `ask_clock`: all ranks follow rank 0's clock."""
        if self._every and step % self._every == 0:
            return True
        if not (ask_clock and self._minutes):
            return False
        return self._env.broadcast_flag(time.monotonic() - self._saved_at > 60 * self._minutes)

    def save(self, state: TrainState, *, loader: dict[str, int]) -> None:
        """Writes a checkpoint of the state. Collective: every rank must call it; rank 0 writes.

        Args:
            loader: what the order of samples depends on, and the number of ranks.

        Raises:
            CheckpointError: the checkpoint could not be written; those before it are untouched.
        """
        saved = {**state.state_dict(), "loader": loader}
        weights = gathered(state.model.state_dict())
        with raised_on_every_rank(CheckpointError):
            if self._env.is_main:
                self._write(state, weights, saved)
        self._saved_at = time.monotonic()

    def _write(self, state: TrainState, weights: dict[str, Tensor], saved: dict[str, Any]) -> None:
        final = self.path(state.step)
        part = self.folder / f".part_{final.name}"
        try:
            part.mkdir()
            save_weights(state.model, part / "model.safetensors", weights)
            with (part / "state.pt").open("wb") as file:
                torch.save(saved, file)
                file.flush()
                os.fsync(file.fileno())
            (part / "config.yaml").write_text(self._config, encoding="utf-8")
            (part / CONFIG_FILE).write_text(self._architecture, encoding="utf-8")
            if final.exists():  # saved at this very step before the run was resumed
                shutil.rmtree(final)
            part.rename(final)
            _flush_folder(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save have errors of their own
            why = "the disk is full: make room, or lower checkpoint.keep_last" if disk_is_full(error) else str(error)
            raise CheckpointError(f"cannot write checkpoint {final}: {why}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        log.info("saved %s", final)
        self._remove_old()

    def _remove_old(self) -> None:
        found = sorted(p for p in self.folder.iterdir() if NAME.fullmatch(p.name))
        for path in found[: -self._keep_last]:
            if not (self._keep_every and int(path.name.removeprefix("step_")) % self._keep_every == 0):
                shutil.rmtree(path)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk or its quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # as libraries without an errno say it
            return True
        error = error.__cause__ or error.__context__
    return False


def load(path: Path, state: TrainState, env: DistEnv) -> dict[str, int]:
    """Takes a checkpoint into the state and returns what `save` was told of the loader.

    Nothing is unpickled but tensors and plain values.

    Raises:
        ValueError: a file of the checkpoint is missing or damaged.
    """
    instead = f"remove {path} to go on from the checkpoint before it, or from the start where there is none"
    try:
        weights = read_weights(path)
    except WeightsError as error:
        raise ValueError(f"{error}; {instead}") from error
    load_openclip(state.model, weights)
    try:
        saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise ValueError(f"{path / 'state.pt'} cannot be read: {error}; {instead}") from error
    try:
        state.load_state_dict(saved, rank=env.rank, world_size=env.world_size)
        return saved["loader"]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path / 'state.pt'} is not the state of this run ({what}); {instead}") from error


def _flush_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
