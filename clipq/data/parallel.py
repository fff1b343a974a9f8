"""A function over many shards, in processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class WorkerError(RuntimeError):
    """A worker process is gone; the message says what to do."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over(function: Callable[[T], R], tasks: Iterable[T], *, workers: int) -> Generator[tuple[T, R]]:
    """(task, result) of each task in the order in which they finish; one worker is this process.

    Tasks are taken from their iterable no further ahead than two for each worker. Whatever ends this early, Ctrl-C
    among it, ends the processes at once.

    Raises:
        WorkerError: a process was killed.
        Exception: what the function raises.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    # A forked process has torch imported already, which takes seconds.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _begin, (os.getpid(),))
    try:
        yield from _results(pool, function, iter(tasks), ahead=2 * workers)
    except BrokenProcessPool as error:
        raise WorkerError(
            f"one of {workers} worker processes was killed, as happens where memory is short: try again with fewer "
            "--workers"
        ) from error
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()
        raise
    pool.shutdown()


def _begin(parent: int) -> None:
    """Makes a worker end with the command, and only then: the terminal sends Ctrl-C to all processes at once, and a
    worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _results(
    pool: ProcessPoolExecutor, function: Callable[[T], R], tasks: Iterator[T], *, ahead: int
) -> Iterator[tuple[T, R]]:
    running: dict[Future[R], T] = {}
    while True:
        for task in itertools.islice(tasks, ahead - len(running)):
            running[pool.submit(function, task)] = task
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()
