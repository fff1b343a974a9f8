"""A server of one shard, and a folder that keeps what comes from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import colour_samples, write_shard
from tests.kept_shards import COUNT
from tests.remote_server import http_server, impatient


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_shard(tmp_path_factory.mktemp("remote") / "x.tar", colour_samples(COUNT)).read_bytes()


@pytest.fixture(scope="module")
def address(shard: bytes) -> Iterator[str]:
    with http_server(shard) as address:
        yield address


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"
