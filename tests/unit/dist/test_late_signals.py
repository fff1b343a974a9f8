"""A second signal that comes when a run has saved and ends: the code that it ends with stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

ENDING = """
import os, signal, subprocess, sys
from clipq.dist.stop import UNFINISHED, Stopped, caught

try:
    with caught():
        raise Stopped(signal.SIGTERM)
except Stopped:
    os.kill(os.getpid(), signal.{late})
    child = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]
    print(subprocess.run(child).returncode, flush=True)
    sys.exit(UNFINISHED)
"""


@pytest.mark.parametrize(("late", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", -2)])
def test_a_late_signal(late: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", ENDING.format(late=late)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout == ("" if late == "SIGINT" else "-15\n"), "what it starts meanwhile hears signals"
