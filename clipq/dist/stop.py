"""A run that a signal asks to end: Ctrl-C, SIGTERM (a scheduler, a machine that goes away), SIGUSR1 (a warning before).

A signal is only noted, except where nothing is lost by ending on the spot. All ranks then end at one place: what each
knows travels with a sum that they make in every step anyway, and is read a step later, when the device has it ready.

Without torch, which takes seconds to import: a run may be asked to end before.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

UNFINISHED = 75
"""Exit code of a run that was asked to end: EX_TEMPFAIL of sysexits.h. 0 is a run that is done, 1 one that failed."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME = 2.0
"""Seconds in which signals are one: who signals a whole group also reaches a launcher in it, which passes it on."""


class Stopped(SystemExit):
    """The run ends because a signal asked it to, on every rank. Not an error: nothing that handles those sees it."""

    def __init__(self, by: signal.Signals | None) -> None:
        super().__init__(UNFINISHED)
        self.by = by
        """What this rank was sent; None where it was another."""
        self.where = "before its first step"

    def __str__(self) -> str:
        by = "a signal to another rank" if self.by is None else self.by.name
        return f"{by}: the run ended {self.where}; the same command goes on"


class Stop:
    """Whether this process was asked to end, and what all ranks agree on."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.at_once = True
        """Whether a signal raises `Stopped` where the program is: until training begins, nothing is lost by it."""
        self._process = os.getpid()
        self._coming: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def note(self, number: int, _: FrameType | None) -> None:
        """Handles a signal."""
        if os.getpid() != self._process:  # a child that has not set its own handlers yet
            return
        self.asked = self.asked or signal.Signals(number)
        if self.at_once:
            self.at_once = False
            raise Stopped(self.asked)

    @contextmanager
    def breaks_off(self, allowed: bool) -> Iterator[None]:
        """Around what may take long and changes nothing: where allowed, a signal ends it.

        Raises:
            Stopped: there was a signal, now or before.
        """
        self.at_once = allowed
        try:
            if allowed and self.asked:
                raise Stopped(self.asked)
            yield
        finally:
            self.at_once = False

    def agree(self) -> None:
        """Ends all ranks if one is asked to. Collective.

        Raises:
            Stopped: on every rank.
        """
        from clipq.dist.gather import gather_objects

        if any(gather_objects(self.asked is not None)):
            raise Stopped(self.asked)

    def hear(self, askers: Tensor) -> None:
        """Takes how many ranks were asked to end by a step, on the device, and begins to fetch it."""
        import torch

        number, ready = askers.to("cpu", non_blocking=True), None
        if askers.is_cuda:
            ready = torch.cuda.Event(blocking=True)
            ready.record()
        self._coming.append((number, ready))

    def agree_late(self) -> None:
        """Ends all ranks if one was asked to by the step before the last: the device has work while this waits.

        Raises:
            Stopped: on every rank, for all of them hear the same numbers.
        """
        if len(self._coming) < 2:
            return
        number, ready = self._coming.pop(0)
        if ready is not None:
            ready.synchronize()
        if number.item():
            raise Stopped(self.asked)


@contextmanager
def caught() -> Iterator[Stop]:
    """Notes signals within, and ends the process as it should end by them: with a line, without a traceback.

    After Ctrl-C it ends by that signal, as a shell expects that is to end its own loops and lists too; after others
    with the code `UNFINISHED`, which a script tells from success and failure.
    """
    stop = Stop()
    # one that is ignored stays so: a shell starts what is in its background like that
    before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
    threading.Thread(target=_watch, args=(source,), daemon=True).start()
    for number in before:
        signal.signal(number, stop.note)
    try:
        yield stop
    except Stopped as stopped:
        first = int(os.environ.get("RANK", "0")) == 0
        log.log(logging.WARNING if first else logging.INFO, "%s", stopped)
        if stopped.by is signal.SIGINT:
            sys.excepthook = lambda *_: None
            before[signal.SIGINT] = signal.SIG_DFL  # one that comes late ends it the same way, and prints no traceback
            raise KeyboardInterrupt from None  # the interpreter then ends by SIGINT
        # One that comes late, to who has saved and is about to end, must not change the code that it ends with. Heard
        # and not ignored: processes that are started would inherit that.
        before |= {n: lambda *_: None for n in before if n is not signal.SIGINT}
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error of a loader process that is killed
        _end_children()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(sink)


def _end_children() -> None:
    """Loader processes do not hear signals (`clipq.data.loader`) and would be waited for."""
    for child in multiprocessing.active_children():
        child.kill()


def _watch(source: int) -> None:
    """Ends the process at the second Ctrl-C or SIGTERM. A thread, since Python handles no signal while the main one is
    in a call that does not return, such as a sum with a rank that is gone."""
    asked, first = False, 0.0
    while byte := os.read(source, 1):
        if byte[0] not in SIGNALS:
            continue
        sent, now = signal.Signals(byte[0]), time.monotonic()
        if not asked:
            log.info("%s: the run saves and ends; Ctrl-C or SIGTERM once more ends it at once", sent.name)
        asked = True
        if sent is signal.SIGUSR1:  # a warning, which the end follows
            continue
        first = first or now
        if now - first > SAME:
            try:
                os.write(sys.stderr.fileno(), f"\n{sent.name} once more: ended at once\n".encode())
                with suppress(RuntimeError):  # of children that come meanwhile
                    _end_children()
            finally:
                os._exit(128 + sent)
