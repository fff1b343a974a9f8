"""A copy of a run at an address that fsspec knows, as `s3://bucket/runs`: it outlives the machine that trains.

The copy looks as the run's folder does. In a checkpoint `checksums.json` is put last and removed first: where it is,
the rest is, for such stores know no renaming. A process of its own puts checkpoints there, by `python -m`: a thread
would take the training's time under Python's lock, and hold other locks while loader processes are forked; and the
process goes on where training is told to end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from clipq.data import remote
from clipq.train import checksums
from clipq.train.kept import Keep, newest, whole

T = TypeVar("T")
log = logging.getLogger(__name__)

FOLDER = "checkpoints"
LOG = "upload.log"
"""In the run's folder of logs: what the uploading processes say."""
FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors that another try would meet too."""


class RemoteRun:
    """The copy of a run.

    Args:
        address: of the copy's folder.

    Raises:
        RemoteError: what is needed for such addresses is not installed.
        ValueError: fsspec knows no such protocol, or none that can be written.
    """

    def __init__(self, address: str) -> None:
        if "://" not in address or address.startswith(remote.HTTP):
            raise ValueError(f"{address}: expected a folder that can be written by fsspec, as s3://bucket/runs")
        remote.require_protocol(address)
        import fsspec

        self.address = address
        self._files, self._root = fsspec.core.url_to_fs(address, use_listings_cache=False, **remote.limits(address))

    def checkpoints(self) -> list[str]:
        """Names of those that are whole, by step."""
        return [name for name in whole(self._names(FOLDER)) if self._exists(f"{FOLDER}/{name}/{checksums.NAME}")]

    def put_files(self, folder: Path) -> None:
        """Copies the files of a run's folder itself: metrics, configuration."""
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self._put(path, path.name)

    def get_files(self, folder: Path) -> None:
        """Copies them back, over those that are there."""
        for name in self._names():
            if not self._again(name, lambda name=name: self._files.isdir(self._at(name))):
                self._get(name, folder / name)

    def put(self, path: Path, keep: Keep) -> None:
        """Copies a checkpoint, and then removes those that are not to be kept, and what is left of older ones."""
        if not self._has(path):
            self._remove(path.name)  # parts of it, or one that had its name before the run was begun anew
            for file in sorted(path.iterdir(), key=lambda file: file.name == checksums.NAME):
                self._put(file, f"{FOLDER}/{path.name}/{file.name}")
        ours = self.checkpoints()
        parts = [name for name in whole(self._names(FOLDER)) if name not in ours and name < path.name]
        for name in keep.superseded(ours) + parts:
            self._remove(name)

    def get(self, name: str, folder: Path) -> None:
        """Copies a checkpoint into a new folder."""
        folder.mkdir()
        for file in self._names(f"{FOLDER}/{name}"):
            self._get(f"{FOLDER}/{name}/{file}", folder / file)

    def _has(self, path: Path) -> bool:
        at = f"{FOLDER}/{path.name}/{checksums.NAME}"
        same = (path / checksums.NAME).read_bytes()
        return self._exists(at) and self._again(at, lambda: self._files.cat_file(self._at(at))) == same

    def _remove(self, name: str) -> None:
        at = f"{FOLDER}/{name}"
        for path in (f"{at}/{checksums.NAME}", at):
            if self._exists(path):
                self._again(path, lambda path=path: self._files.rm(self._at(path), recursive=path == at))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _names(self, path: str = "") -> list[str]:
        try:
            listed = self._again(path, lambda: self._files.ls(self._at(path), detail=False))
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in listed)

    def _exists(self, path: str) -> bool:
        return self._again(path, lambda: self._files.exists(self._at(path)))

    def _put(self, file: Path, path: str) -> None:
        at = self._at(path)
        put = functools.partial(self._files.put_file, str(file), at)
        try:
            self._again(path, put)
        except FileNotFoundError:
            if not self._exists(""):  # a missing bucket is a mistake, and none that is made here
                top = self._root.partition("/")[0] or "/"
                if not self._again(top, lambda: self._files.exists(top)):
                    raise
            self._files.makedirs(at.rpartition("/")[0], exist_ok=True)
            self._again(path, put)

    def _get(self, path: str, file: Path) -> None:
        self._again(path, lambda: self._files.get_file(self._at(path), str(file)))

    def _again(self, path: str, call: Callable[[], T]) -> T:
        for attempt in range(1, remote.TRIES + 1):
            try:
                return call()
            except FINAL:
                raise
            except Exception as error:  # each protocol has errors of its own
                what = f"{type(error).__name__}: {error}"
                if "Credentials" in type(error).__name__:
                    raise remote.RemoteError(f"{self.address}: {what}") from error
                if attempt == remote.TRIES:
                    where = f"{self.address}/{path}".rstrip("/")
                    raise remote.RemoteError(f"{where}: {remote.TRIES} tries failed, the last with {what}") from error
                wait = remote.PATIENCE * 2 ** (attempt - 1)
                log.warning("%s/%s: %s; again in %.3g s", self.address, path, what, wait)
                time.sleep(wait)
        raise AssertionError


def fetch(run: RemoteRun, folder: Path) -> list[str]:
    """Copies the newest whole checkpoint into a run's folder, and its metrics, where it has none as new.

    Returns:
        What was copied, or found damaged, a sentence for each.
    """
    here, there = newest(folder / FOLDER), run.checkpoints()
    said: list[str] = []
    for name in reversed(there):
        if here is not None and name <= here.name:
            break
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        part = folder / FOLDER / f".part_{name}"
        shutil.rmtree(part, ignore_errors=True)
        begun = time.monotonic()
        run.get(name, part)
        if (what := checksums.damage(part)) is not None:
            shutil.rmtree(part)
            said.append(f"{run.address}/{FOLDER}/{name} is damaged: {what}")
            continue
        run.get_files(folder)
        part.rename(folder / FOLDER / name)
        return [*said, f"fetched {name} from {run.address} in {time.monotonic() - begun:.0f} s"]
    return said


class Uploads:
    """Has checkpoints uploaded one by one while training goes on. Where several wait, the newest is, the others not.

    Args:
        folder: of the run.
        address: of its copy.
        keep: which checkpoints stay there.
    """

    def __init__(self, folder: Path, address: str, keep: Keep) -> None:
        self._folder, self._address, self._keep = folder, address, keep
        self._process: subprocess.Popen[bytes] | None = None
        self._next: Path | None = None
        self.reading: Path | None = None
        """The checkpoint that is being uploaded: it must stay."""
        self.failed: str | None = None
        """Why the last one could not be uploaded; None if it was."""

    def add(self, path: Path) -> None:
        self._next = path

    def poll(self) -> tuple[int, str] | None:
        """Begins what waits, where nothing is being uploaded; the step of what has failed meanwhile, and why."""
        failure = None
        if self._process is not None and self._process.poll() is not None:
            failure = self._ended(self._process)
        if self._process is None and self._next is not None:
            self._begin(self._next)
        return failure

    def busy(self, seconds: float) -> bool:
        """Whether something is being uploaded; waits so long for its end."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        return self._process is not None or self._next is not None

    def leave(self) -> None:
        """Says what is not uploaded yet, where the run is told to end."""
        if self._process is not None and self._process.poll() is None:
            log.warning("%s is being uploaded by process %d, which goes on", self.reading, self._process.pid)

    def _begin(self, path: Path) -> None:
        self.reading, self._next = path, None
        if not path.exists():  # it waited, and its time to be kept was over before the turn came to it
            self.reading = None
            return
        command = [sys.executable, "-m", __name__, str(path), self._address, *map(str, self._keep)]
        with (self._folder / "logs" / LOG).open("ab") as said:
            # in a session of its own: Ctrl-C is not meant for it
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )

    def _ended(self, process: subprocess.Popen[bytes]) -> tuple[int, str] | None:
        path, code, file = self.reading, process.returncode, self._folder / "logs" / LOG
        assert path is not None
        self._process = self.reading = self.failed = None
        last = (file.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
        if code == 0:
            log.info("%s", last)
            return None
        self.failed = last if code == 1 else f"the process that uploads {path.name} ended with {code}: see {file}"
        return int(path.name.removeprefix("step_")), self.failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Uploads a checkpoint of a run, and the run's metrics")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("address", help="of the run's copy")
    parser.add_argument("keep_last", type=int)
    parser.add_argument("keep_every", type=int)
    options = parser.parse_args()
    path: Path = options.checkpoint
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    begun = time.monotonic()
    try:
        run = RemoteRun(options.address)
        run.put(path, Keep(options.keep_last, options.keep_every))
        run.put_files(path.parent.parent)
    except Exception as error:  # each protocol has errors of its own; the last line is the run's message
        print(f"cannot upload {path.name} to {options.address}: {type(error).__name__}: {error}".replace("\n", " "))
        return 1
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"uploaded {path.name} to {options.address}: {size / 2**20:,.0f} MiB in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
