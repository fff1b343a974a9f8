"""The Triton kernels run without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy
import pytest
import triton

from tests.helpers import REPO

QUANTIZED = ("tests/kernels/against_reference.py", "tests/kernels/non_finite.py")
OPTIMIZER = ("tests/kernels/optimizer_steps.py",)


def release(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


@pytest.mark.skipif(
    release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4),
    reason="the interpreter of Triton 3.6 fails with NumPy 2.4 and newer",
)
@pytest.mark.parametrize(("files", "at_least"), [(QUANTIZED, 300), pytest.param(OPTIMIZER, 10, marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(files: tuple[str, ...], at_least: int) -> None:
    """In a process of its own: the variable counts when the kernels are imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *files,
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::RuntimeWarning",
        ],
        cwd=REPO,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"to see more: TRITON_INTERPRET=1 pytest {' '.join(files)}\n{done.stdout[-6000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least, done.stdout[-500:]
