"""A rank hangs or is gone, and the others wait for it: which one it is, and where in the program each of them waits.

Every rank leaves word in the store, every few seconds, of what it does. One that gets nowhere for the time of the limit
writes the stacks of its threads to its log, reads who is behind or silent, says so and ends. Torch's own limits on
collectives name no rank, do not hold within a CUDA graph, and see nothing of a rank that waits for its data.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from clipq.dist.env import DistEnv

log = logging.getLogger(__name__)

BEAT = 2.0
"""Seconds between two words of a rank. One that says nothing new for two and a half times as long is silent."""
TELLING = 15 * BEAT
"""Seconds that a rank has at most to say why it ends: its store, its disk and its terminal may hang too."""
FREE = 3
"""Steps after a pause that no limit holds for: ranks come back from it at different times, and compile or record."""
SHOWN = 8
"""Ranks that a message names."""


class Place(IntEnum):
    """Where a rank is, in the order of a step: who is behind has the smaller one."""

    PAUSE, DATA, STEP = range(3)


WORDS = ("begins, evaluates, saves or goes back before step {}", "waits for the data of step {}", "is in step {}")


class Now(NamedTuple):
    step: int
    place: Place
    since: float
    """By `time.monotonic`."""
    steps: int
    """That were begun since the last pause, with this one."""


class Progress:
    """What this rank does, as the loop says; other threads read it."""

    def __init__(self) -> None:
        self.now = Now(1, Place.PAUSE, time.monotonic(), 0)

    def enter(self, step: int, place: Place) -> None:
        steps = 0 if place is Place.PAUSE else self.now.steps + (place is Place.DATA)
        self.now = Now(step, place, time.monotonic(), steps)


class _Watchdog:
    def __init__(self, env: DistEnv, progress: Progress, limit: float, folder: Path) -> None:
        assert env.store is not None
        self._env, self._progress, self._limit, self._folder = env, progress, limit, folder
        self._store = env.store.clone()  # a connection of its own: one call at a time may wait on each
        self._done = threading.Event()
        self._beats = 0
        self._host = socket.gethostname()
        self._file = (folder / f"rank_{env.rank}.log").open("a")
        faulthandler.enable(self._file)  # for aborts too, which is how NCCL ends a process
        self._beat()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._keep_beating, self._watch)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(BEAT)
        faulthandler.disable()
        self._file.close()

    def _beat(self) -> None:
        self._beats += 1
        now = self._progress.now
        seconds = time.monotonic() - now.since
        self._store.set(
            f"clipq/beat/{self._env.rank}", json.dumps([self._beats, self._host, now.step, now.place, seconds])
        )

    def _keep_beating(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it who hosts it
            while not self._done.wait(BEAT):
                self._beat()

    def _watch(self) -> None:
        while not self._done.wait(min(BEAT, self._limit / 4)):
            now = self._progress.now
            if now.steps > FREE and time.monotonic() - now.since > self._limit:
                _within(TELLING, self._tell)
                os._exit(1)

    def _tell(self) -> None:
        now, rank = self._progress.now, self._env.rank
        self._file.write("stacks of all threads, the newest call first:\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file)
        self._file.flush()
        doing = WORDS[now.place].format(now.step)
        what = f"no progress for {time.monotonic() - now.since:.0f} s (parallel.step_timeout_minutes)"
        what = f"{what}: this rank {doing}; {self.report()}"
        log.error("%s; where: %s", what, self._file.name)
        _within(BEAT, lambda: self._env.tell_why(what))
        if self._env.device.type == "cuda":
            from torch._C._distributed_c10d import _dump_nccl_trace  # pyright: ignore

            (self._folder / f"nccl_trace_rank_{rank}").write_bytes(_dump_nccl_trace())
        # Others come to this a moment later, and want to read too; without torchrun, rank 0 has the store.
        time.sleep(2 * BEAT * (1 + self._env.is_main))

    def report(self) -> str:
        """Who is silent or else behind. Takes some seconds; asks nothing of other ranks that they do not do anyway."""
        read: list[list[Any]] = []
        keys = [f"clipq/beat/{r}" for r in range(self._env.world_size)]

        def ask() -> None:
            for pause in (2.5 * BEAT, 0):
                read.append([json.loads(b) for b in self._store.multi_get(keys)])
                time.sleep(pause)

        _within(5 * BEAT, ask)
        if len(read) == 2:
            return describe(*read)
        address = ":".join(os.environ.get(k, "?") for k in ("MASTER_ADDR", "MASTER_PORT"))
        return f"the store at {address} does not answer: rank 0, its host or the way to it is gone"


def _within(seconds: float, function: Callable[[], None]) -> None:
    """Calls what may never return, in a thread of its own, and goes on after that time. Its RuntimeErrors are lost."""

    def call() -> None:
        with suppress(RuntimeError):
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def describe(first: list[list[Any]], second: list[list[Any]]) -> str:
    """Who is silent or else behind, in words, of what all ranks said last, read twice: [beats, host, step, place,
    seconds]."""
    silent = [r for r, (a, b) in enumerate(zip(first, second, strict=True)) if a[0] == b[0]]
    places = [tuple(beat[2:4]) for beat in second]
    behind = [r for r, place in enumerate(places) if place == min(places)]
    if not silent and len(behind) == len(places):
        return f"all {len(places)} ranks are at the same place"
    found = []
    for rank in silent or behind:
        _, host, step, place, seconds = second[rank]
        doing = WORDS[place].format(step)
        found.append(
            f"rank {rank} (host {host}) is silent, the last it said: it {doing}"
            if silent
            else f"rank {rank} (host {host}) {doing} since {seconds:.0f} s, and others wait for it"
        )
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _lost_peer(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def watched(env: DistEnv, progress: Progress, *, limit: float, folder: Path) -> Iterator[None]:
    """Around training on several ranks: ends this one where it gets nowhere, and says which rank is to blame.

    Args:
        limit: seconds that a step, or the wait for its data, may take.
        folder: of the ranks' logs.

    Raises:
        RuntimeError: a collective failed, and no rank has said why: the message names those that are gone.
    """
    if env.store is None:
        yield
        return
    watchdog = _Watchdog(env, progress, limit, folder)
    try:
        yield
    except Exception as error:
        if not _lost_peer(error) or env.why() is not None:
            raise
        progress.enter(progress.now.step, Place.PAUSE)  # or the limit would strike while this finds out
        raise RuntimeError(f"lost another rank: {watchdog.report()}") from error
    finally:
        watchdog.close()
