"""Remote shards that are kept as files: what lies there, and what was asked of the server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from clipq.data.cache import HEAD, PART, Cache
from clipq.data.shards import Damage, read_shard
from tests.remote_server import Handler

COUNT = 100
WHOLE = [f"{n:06d}" for n in range(COUNT)]


def new_run(folder: Path, limit: float = 1e9) -> Cache:
    """As another command would have it: what lies there is from before."""
    time.sleep(0.01)
    cache = Cache(str(folder), int(limit))
    cache.check()
    return cache


def keys(url: str, cache: Cache, told: list[Damage] | None = None) -> list[str]:
    return [s["__key__"] for s in read_shard(url, cache=cache, on_damage=(told if told is not None else []).append)]


def kept(folder: Path) -> list[str]:
    """Addresses of the files."""
    urls = []
    for path in folder.glob("?" * 64):
        stat = path.stat()
        urls.append(json.loads(path.read_bytes()[:HEAD].split(b"\n")[0])["url"])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # to have looked is no use of it
    return sorted(urls)


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(f"*{PART}"))


def asked() -> int:
    """Requests since the last time."""
    count = len(Handler.requests)
    Handler.requests.clear()
    return count


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
