"""Checkpoints of a run: when they are due, how they are written, which are kept, how a run finds its newest.

A checkpoint is a folder `step_00001000` with `model.safetensors` (OpenCLIP's keys, loadable by OpenCLIP as it is),
`open_clip_config.json` (the architecture), `state.pt` (optimizer, generators, counters), `config.yaml` and the
`checksums.json` of these. It is written by a thread of rank 0 while training goes on, under another name, flushed to
the disk and renamed: a folder with the right name is complete, whenever the process is killed.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from clipq.dist.env import DistEnv
from clipq.dist.gather import raised_on_every_rank
from clipq.model.weights import (
    CONFIG_FILE,
    WeightsError,
    load_openclip,
    preprocess_of,
    read_weights,
    sync,
    to_openclip,
    write_weights,
)
from clipq.train import checksums
from clipq.train.kept import Keep, found, newest
from clipq.train.snapshot import Snapshot
from clipq.train.state import TrainState
from clipq.train.upload import Uploads

log = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint cannot be written; those before it are untouched."""


def set_aside_damaged(folder: Path) -> list[str]:
    """Renames the newest checkpoints to `damaged_step_…` until the newest is as it was written; for rank 0 alone.

    Under that name they count neither as something to go on from nor among those that are kept.

    Returns:
        What was wrong, a sentence for each.

    Raises:
        ValueError: none is as it was written, and all have stayed where they are; or a file may not be read.
    """
    damaged: list[tuple[Path, str]] = []
    try:
        for path in reversed(found(folder)):
            if (what := checksums.damage(path)) is None:
                break
            damaged.append((path, what))
        else:
            if damaged:
                each = "; ".join(f"{broken}: {what}" for broken, what in damaged)
                raise ValueError(
                    f"no checkpoint of this run is whole: {each}. Put the files of one back, choose another name=, or "
                    f"remove {folder} to begin anew"
                )
            return []
        for broken, _ in damaged:
            shutil.rmtree(_aside(broken), ignore_errors=True)
            broken.rename(_aside(broken))
    except PermissionError as error:
        raise ValueError(f"cannot check the checkpoints of this run: {error}") from error
    return [
        f"{broken} is damaged: {what}. It is now {_aside(broken).name}, and the run goes on from {path.name}"
        for broken, what in damaged
    ]


def _aside(path: Path) -> Path:
    return path.with_name(f"damaged_{path.name}")


class Checkpoints:
    """The folder of checkpoints of a run.

    Args:
        every: steps between two checkpoints; 0 for none but the last.
        minutes: minutes between two checkpoints, whichever comes first; 0 for none.
        keep: which are kept.
        uploads: has each one copied to another place; None for none.
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
        keep: Keep,
        uploads: Uploads | None,
        config: str,
        architecture: str,
    ) -> None:
        self.folder = folder
        self._env = env
        self._every, self._minutes = every, minutes
        self._keep, self.uploads = keep, uploads
        self._config, self._architecture = config, architecture
        self._saved_at = time.monotonic()
        self._snapshot = Snapshot()
        self._writing: _Write | None = None
        self._failures: list[tuple[int, CheckpointError]] = []
        if env.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".part_*"):
                shutil.rmtree(leftover)

    def newest(self) -> Path | None:
        """The newest checkpoint, after the one that is being written, which rank 0 alone knows of."""
        self.wait()
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

    def save(self, state: TrainState, *, loader: dict[str, int], wait: bool) -> None:
        """Writes a checkpoint of the state as it is now. Collective: every rank must call it; rank 0 writes.

        One is written at a time: this waits for the one before.

        Args:
            loader: what the order of samples depends on, and the number of ranks.
            wait: until it is written; without, it is written while training goes on, and where that fails,
                `failures` tells.

        Raises:
            CheckpointError: it was waited for and could not be written; those before it are untouched.
        """
        self.wait()
        tree = {"weights": to_openclip(state.model), "saved": {**state.state_dict(), "loader": loader}}
        copy = self._snapshot.take(tree, keep=self._env.is_main)
        if self._env.is_main:
            write = functools.partial(self._write, self.path(state.step), copy, preprocess_of(state.model))
            self._writing = _Write(state.step, write)
        if wait:
            with raised_on_every_rank(CheckpointError):
                if (error := self._finished()) is not None:
                    raise error
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Waits until nothing is being written. No collective, and nothing to wait for but on rank 0."""
        step = 0 if self._writing is None else self._writing.step
        if (error := self._finished()) is not None:
            log.warning("%s; training goes on, older checkpoints are whole, and the next save tries again", error)
            self._failures.append((step, error))

    def failures(self) -> list[tuple[int, CheckpointError]]:
        """Steps whose checkpoints could not be written, and why, as far as is known and was not told before."""
        if self._writing is not None and not self._writing.is_alive():
            self.wait()
        told, self._failures = self._failures, []
        return told

    def _finished(self) -> CheckpointError | None:
        """Waits for what is being written, and says why it could not be."""
        if (writing := self._writing) is None:
            return None
        writing.join()
        self._writing = None
        if isinstance(writing.error, CheckpointError):
            return writing.error
        if writing.error is not None:
            raise writing.error
        log.info("saved %s", self.path(writing.step))
        if self.uploads is not None:
            self.uploads.add(self.path(writing.step))
        return None

    # What follows runs in a thread, and processes may be forked meanwhile. So it logs nothing and takes no lock that
    # a child could need. A child has the open file of a checkpoint too, whose room comes free when it ends.

    def _write(self, final: Path, copy: dict[str, Any], preprocess: dict[str, Any]) -> None:
        part, old = self.folder / f".part_{final.name}", self.folder / f".part_old_{final.name}"
        try:
            self._need_room()
            part.mkdir()
            write_weights(copy["weights"], preprocess, part / "model.safetensors")
            with (part / "state.pt").open("wb") as file:
                torch.save(copy["saved"], file)
            for name, text in (("config.yaml", self._config), (CONFIG_FILE, self._architecture)):
                (part / name).write_text(text, encoding="utf-8")
            (part / checksums.NAME).write_text(checksums.checksums(part), encoding="utf-8")
            for path in (*part.iterdir(), part):
                sync(path)
            with suppress(FileNotFoundError):  # saved at this very step before the run was resumed
                final.rename(old)
            part.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            sync(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save have errors of their own
            with suppress(OSError):
                old.rename(final)
            why = "the disk is full: make room, or lower checkpoint.keep_last" if disk_is_full(error) else str(error)
            raise CheckpointError(f"cannot write checkpoint {final}: {why}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self._remove_old(final)

    def _need_room(self) -> None:
        """Finds a full disk before it is: training writes its metrics there meanwhile, and would end for want of room.

        Raises:
            OSError: no space is left on the device.
        """
        disk = shutil.disk_usage(self.folder)
        if disk.total and disk.free < self._snapshot.nbytes:  # some file systems know neither
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _remove_old(self, saved: Path) -> None:
        """Removes what is not to be kept. What cannot be removed stays, until the next time or a start of the run."""
        for name in self._keep.superseded(path.name for path in found(self.folder)):
            path = self.folder / name
            if self.uploads is None or path != self.uploads.reading:
                gone = self.folder / f".part_old_{name}"  # a kill must leave nothing half under the right name
                with suppress(OSError):
                    path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        for path in self.folder.glob("damaged_step_*"):
            if path.name <= _aside(saved).name:
                shutil.rmtree(path, ignore_errors=True)


class _Write(threading.Thread):
    """A checkpoint that is being written. The interpreter waits for it at its end, but for `os._exit`."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        super().__init__(name=f"checkpoint of step {step}")
        self.step = step
        self.error: BaseException | None = None
        self._write = write
        self.start()

    def run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self.error = error


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
