from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from clipq.log.console import CLEAR_LINE, Console, format_duration, setup_logging

ROW = {
    "step": 20,
    "loss": 3.14159,
    "lr": 1e-3,
    "logit_scale": 14.3,
    "images_per_second": 12345.6,
    "data_wait": 0.021,
    "memory_gib": 3.26,
    "mfu": 0.24,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_says_it_all() -> None:
    out = io.StringIO()
    Console(stream=out).progress(ROW, steps=1000, seconds_per_step=0.5)
    assert out.getvalue() == (
        "step   20/1000 | loss 3.1416 | lr 1.00e-03 | scale 14.3 | 12,346 img/s | data wait 2% | mem 3.3 GiB | "
        "MFU 24% | ETA 8:10\n"
    )


def test_file_or_pipe_gets_plain_lines() -> None:
    out = io.StringIO()
    console = Console(stream=out)
    for _ in range(2):
        console.progress(ROW | {"mfu": None}, steps=1000, seconds_per_step=0.5)
    console.status("a passing remark")
    console.message("saved")
    console.close()
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "MFU" not in out.getvalue()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[2] == "saved"


def test_elsewhere_than_on_a_terminal_a_silent_minute_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("clipq.log.console.time.monotonic", lambda: now)
    out = io.StringIO()
    console = Console(stream=out)
    for second in range(0, 200, 10):
        now = float(second)
        console.status(f"after {second} s")
    assert out.getvalue().splitlines() == ["after 60 s", "after 120 s", "after 180 s"]


def test_terminal_rewrites_the_live_line_and_keeps_messages() -> None:
    out = Terminal()
    console = Console(stream=out)
    console.progress(ROW, steps=1000, seconds_per_step=0.5)
    console.message("saved")
    console.progress(ROW, steps=1000, seconds_per_step=0.5)
    console.close()
    text = out.getvalue()
    assert text.count("\n") == 2, "one after the message, one at the end"
    assert f"{CLEAR_LINE}saved\n" in text


def test_other_ranks_are_silent_but_for_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=False)
    setup_logging(console, file=tmp_path / "logs" / "rank_1.log", rank=1)
    logging.getLogger("clipq.somewhere").warning("a shard is broken")
    console.progress(ROW, steps=10, seconds_per_step=1)
    assert capsys.readouterr() == ("", "")
    logging.getLogger("clipq.somewhere").error("this ends the run")
    assert capsys.readouterr() == ("", "[rank 1] error: this ends the run\n")
    in_file = (tmp_path / "logs" / "rank_1.log").read_text()
    assert "WARNING clipq.somewhere: a shard is broken" in in_file
    assert "ERROR clipq.somewhere: this ends the run" in in_file


def test_log_records_reach_console_and_file(tmp_path: Path) -> None:
    out = io.StringIO()
    for _ in range(2):  # set up twice in a process: nothing is said twice
        setup_logging(Console(stream=out), file=tmp_path / "r.log")
    logging.getLogger("clipq.x").info("hello")
    logging.getLogger("clipq.x").warning("careful")
    assert out.getvalue() == "hello\nwarning: careful\n"
    assert (tmp_path / "r.log").read_text().count("hello") == 1


def test_format_duration() -> None:
    assert [format_duration(s) for s in (0, 61.4, 3600, 100000)] == ["0:00", "1:01", "1:00:00", "27:46:40"]
