from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import colour_shards, tiny_arch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run commands in: shards of 128 samples, a tiny model. Modules that need another have their own."""
    folder = tmp_path_factory.mktemp("world")
    colour_shards(folder / "data", [40, 31, 57])
    tiny_arch(folder)
    return folder
