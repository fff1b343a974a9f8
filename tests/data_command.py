"""What the tests of `clipq-data` share."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from clipq.cli.data import main
from clipq.data.shards import read_shard


def run(*arguments: object, workers: int = 1) -> int:
    return main([*map(str, arguments), "--workers", str(workers)])


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples_of(folder: Path) -> list[dict[str, bytes]]:
    return [s for shard in sorted(folder.glob("*.tar")) for s in read_shard(str(shard))]


def image_of(sample: dict[str, bytes]) -> bytes:
    return sample["png"] if "png" in sample else sample["jpg"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
