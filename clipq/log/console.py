"""The live line on a terminal, plain lines elsewhere, and a log file for each rank."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

CLEAR_LINE = "\r\x1b[2K"
SILENT_SECONDS = 60


class Console:
    """Prints progress. On a terminal the newest step rewrites its own line; elsewhere each is a line of its own.

    Args:
        enabled: False on all ranks but 0: nothing is printed.
    """

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._live = self._stream.isatty()
        self._open_line = False
        self._last_line = time.monotonic()

    def progress(self, row: dict[str, Any], *, steps: int, seconds_per_step: float) -> None:
        """The state of the run after a step, from a metrics row with its speed fields."""
        if not self._enabled:
            return
        line = format_progress(row, steps=steps, seconds_per_step=seconds_per_step)
        self._stream.write(f"{CLEAR_LINE}{line}" if self._live else f"{line}\n")
        self._stream.flush()
        self._open_line = self._live
        self._last_line = time.monotonic()

    def status(self, text: str) -> None:
        """What is going on: gone with the next line. Elsewhere than on a terminal, a line after each silent minute."""
        if not self._enabled:
            return
        if self._live:
            self._stream.write(CLEAR_LINE + text)
            self._stream.flush()
            self._open_line = True
        elif time.monotonic() - self._last_line >= SILENT_SECONDS:
            self.message(text)

    def message(self, text: str) -> None:
        """A line that stays."""
        if not self._enabled:
            return
        self._stream.write((CLEAR_LINE if self._open_line else "") + text + "\n")
        self._stream.flush()
        self._open_line = False
        self._last_line = time.monotonic()

    def close(self) -> None:
        """Ends the live line."""
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False


def format_progress(row: dict[str, Any], *, steps: int, seconds_per_step: float) -> str:
    """One line: step, loss, learning rate, logit scale, images/s, wait for data, memory, MFU, time to go."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"scale {row['logit_scale']:.1f}",
        f"{row['images_per_second']:,.0f} img/s",
        f"data wait {row['data_wait']:.0%}",
        f"mem {row['memory_gib']:.1f} GiB",
    ]
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    parts.append(f"ETA {format_duration((steps - row['step']) * seconds_per_step)}")
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class _ConsoleHandler(logging.Handler):
    """Log records through the console, so that they do not break the live line."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        self._console.message(prefix + record.getMessage())


class _OtherRankHandler(logging.StreamHandler):
    """Errors of a rank other than 0 on stderr: rank 0 would only see that a connection was closed."""

    def __init__(self, rank: int) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.ERROR)
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        return f"[rank {self._rank}] {record.levelname.lower()}: {record.getMessage()}"


def setup_logging(console: Console, *, file: Path | None, rank: int = 0) -> None:
    """Sends clipq's log records to the console, or errors alone to stderr where this is not rank 0, and to this
    rank's log file; a resumed run appends to it."""
    logger = logging.getLogger("clipq")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(_OtherRankHandler(rank) if rank else _ConsoleHandler(console))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(to_file)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = logger.handlers[1:] or [logging.NullHandler()]
    logging.getLogger("py.warnings").propagate = False
