from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.helpers import colour_shards, tiny_arch

torch.set_num_threads(1)
# The same examples in every run: a change must not fail for an old fault that chance finds in it.
# HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
# A graph in the compiler's cache on disk does not know that an operator of clipq has changed since: the tests of one
# command, worker processes and trainers among them, share a cache that begins empty.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="clipq-tests-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's cache or into the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A trainer run within a test leaves handlers behind, which write to that test's output."""
    yield
    for name in ("clipq", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.captureWarnings(False)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Five shards of unequal length, 73 samples in all."""
    return colour_shards(tmp_path / "data", [20, 11, 17, 5, 20])


@pytest.fixture
def arch(tmp_path: Path) -> Path:
    return tiny_arch(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; mounting one takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "clipq-test", folder], capture_output=True)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("cannot mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)
