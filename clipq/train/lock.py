"""One process group at a time in a run folder: two would write each other's files."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipq.config.checks import ConfigError
from clipq.dist.env import DistEnv
from clipq.dist.gather import raised_on_every_rank

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, env: DistEnv) -> Iterator[None]:
    """Makes a run folder and holds its lock, which the kernel releases when the process ends, however it does.

    Collective: every rank must enter it; rank 0 holds the lock.

    Raises:
        ConfigError: on every rank, if the folder cannot be written or another process holds the lock.
    """
    with raised_on_every_rank(ConfigError):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / ".lock").open("a")
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {folder}: {error.strerror}: see that it can be written, or choose "
                "another place with runs="
            ) from error
        if env.is_main:
            _lock(file.fileno(), folder)
    with file:
        yield


def _lock(descriptor: int, folder: Path) -> None:
    try:
        # Not flock(), whose lock a forked loader process would keep for the seconds that it outlives a killed trainer.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ConfigError(
            f"another process trains in {folder}: let it end, end it, or choose another name= for this run"
        ) from error
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): nothing keeps a second process from training in it", folder, error.strerror
        )
