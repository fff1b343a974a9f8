"""The copy of a run at another place: what is whole there, what stays there, and what comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipq.data import remote
from clipq.data.remote import RemoteError
from clipq.train import checksums
from clipq.train.kept import Keep
from clipq.train.upload import RemoteRun, Uploads, fetch
from tests.remote_server import s3_server
from tests.unit.train.saves import LOADER, filled_state, saver

KEEP = Keep(last=2, every=0)


@pytest.fixture(params=["file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a place that may be written, and where nothing is yet."""
    monkeypatch.setattr(remote, "PATIENCE", 0.01)
    if request.param == "file":
        yield f"file://{tmp_path}/there"
        return
    with s3_server(monkeypatch):
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/there"


def run_of(folder: Path, *steps: int, content: str = "") -> Path:
    """The folder of a run with checkpoints of small files."""
    for step in steps:
        path = folder / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        for name in ("model.safetensors", "state.pt", "config.yaml"):
            (path / name).write_text(f"{name} of step {step}{content}")
        (path / checksums.NAME).write_text(checksums.checksums(path))
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": max(steps)}))
    (folder / ".lock").touch()
    return folder


def steps(names: list[str]) -> list[int]:
    return [int(name.removeprefix("step_")) for name in names]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_lost_folder_comes_back(address: str, tmp_path: Path) -> None:
    here, run = run_of(tmp_path / "here", 10, 20), RemoteRun(address)
    assert fetch(run, tmp_path / "other") == []
    for path in sorted((here / "checkpoints").iterdir()):
        run.put(path, KEEP)
    run.put_files(here)
    assert steps(run.checkpoints()) == [10, 20]

    other = tmp_path / "other"
    (said,) = fetch(run, other)
    assert said.startswith(f"fetched step_00000020 from {address}")
    shutil.rmtree(here / "checkpoints" / "step_00000010")
    assert contents(other) == contents(here)
    assert fetch(run, other) == []

    (other / "metrics.jsonl").write_text("of a run that went on here")
    run_of(other, 30)
    assert fetch(run, other) == [], "what is older there is left there"


def test_what_stays_there(address: str, tmp_path: Path) -> None:
    here, run = run_of(tmp_path / "here", 10, 20, 30, 40, 50), RemoteRun(address)
    for path in sorted((here / "checkpoints").iterdir()):
        run.put(path, Keep(last=1, every=20))
    assert steps(run.checkpoints()) == [20, 40, 50]
    assert run._names("checkpoints") == run.checkpoints()


def test_parts_are_not_taken_for_whole(address: str, tmp_path: Path) -> None:
    here, run = run_of(tmp_path / "here", 10, 20, 30), RemoteRun(address)
    ten, twenty, thirty = sorted((here / "checkpoints").iterdir())
    run.put(ten, KEEP)
    run._put(twenty / "state.pt", f"checkpoints/{twenty.name}/state.pt")  # killed after its first file
    assert steps(run.checkpoints()) == [10]
    run.put(thirty, KEEP)
    assert run._names("checkpoints") == [ten.name, thirty.name], "what is left of a kill goes"


def test_another_run_of_the_same_name(address: str, tmp_path: Path) -> None:
    run = RemoteRun(address)
    (old,) = (run_of(tmp_path / "old", 10) / "checkpoints").iterdir()
    (new,) = (run_of(tmp_path / "new", 10, content=", begun anew") / "checkpoints").iterdir()
    run.put(old, KEEP)
    run.put(new, KEEP)
    fetch(run, tmp_path / "other")
    assert contents(tmp_path / "other" / "checkpoints" / new.name) == contents(new)


def test_a_damaged_copy_is_passed_over(address: str, tmp_path: Path) -> None:
    here, run = run_of(tmp_path / "here", 10, 20), RemoteRun(address)
    for path in sorted((here / "checkpoints").iterdir()):
        run.put(path, KEEP)
    (tmp_path / "flipped").write_text("model.safetensors of step 2o")
    run._put(tmp_path / "flipped", "checkpoints/step_00000020/model.safetensors")
    damaged, fetched = fetch(run, tmp_path / "other")
    assert damaged.startswith(f"{address}/checkpoints/step_00000020 is damaged: model.safetensors has changed")
    assert fetched.startswith("fetched step_00000010 ")
    assert [path.name for path in (tmp_path / "other" / "checkpoints").iterdir()] == ["step_00000010"]


def test_a_bucket_that_is_missing_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch):
        import s3fs

        run = RemoteRun("s3://mistyped/run")
        with pytest.raises(FileNotFoundError, match="bucket does not exist"):
            run.put_files(run_of(tmp_path / "here", 10))
        assert s3fs.S3FileSystem().ls("") == []


@pytest.mark.parametrize("address", ["runs", "/data/runs", "http://host/runs", "https://host/runs"])
def test_addresses_that_cannot_be_written(address: str) -> None:
    with pytest.raises(ValueError, match=f"{address}: expected a folder that can be written by fsspec"):
        RemoteRun(address)


def test_tries_end_at_once_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class NoCredentialsError(Exception): ...

    run, tried = RemoteRun(f"file://{tmp_path}/there"), []

    def put_file(*paths: str) -> None:
        tried.append(paths)
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(run._files, "put_file", put_file)
    with pytest.raises(RemoteError, match="there: NoCredentialsError: Unable to locate credentials"):
        run.put_files(run_of(tmp_path / "here", 10))
    assert len(tried) == 1


def test_a_fault_on_the_way_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.001)
    run, tried = RemoteRun(f"file://{tmp_path}/there"), []
    (path,) = (run_of(tmp_path / "here", 10) / "checkpoints").iterdir()
    put_file = run._files.put_file

    def fails_twice(source: str, target: str) -> None:
        tried.append(source)
        if tried.count(source) <= 2:
            raise ConnectionResetError("reset by peer")
        put_file(source, target)

    monkeypatch.setattr(run._files, "put_file", fails_twice)
    run.put(path, KEEP)
    assert steps(run.checkpoints()) == [10]

    def fails(*_: str) -> None:
        tried.append("for good")
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(run._files, "put_file", fails)
    with pytest.raises(RemoteError, match=r"there/metrics\.jsonl: 8 tries failed, the last with ConnectionResetError"):
        run.put_files(path.parent.parent)
    assert tried.count("for good") == remote.TRIES


def waited(uploads: Uploads) -> list[tuple[int, str]]:
    """What failed, once nothing is being uploaded and nothing waits."""
    failed = [uploads.poll()]
    while uploads.busy(seconds=60):
        failed.append(uploads.poll())
    return [failure for failure in failed if failure is not None]


def test_checkpoints_are_uploaded_as_they_are_saved(tmp_path: Path) -> None:
    folder, there = tmp_path / "run", f"file://{tmp_path}/there"
    (folder / "logs").mkdir(parents=True)
    uploads = Uploads(folder, there, KEEP)
    state, checkpoints = filled_state(), saver(folder / "checkpoints", keep_last=1)
    checkpoints.uploads = uploads
    for state.step in (1, 2, 3):
        checkpoints.save(state, loader=LOADER, wait=True)
        if state.step < 3:  # training goes on meanwhile; the first is being uploaded when the second is saved
            assert uploads.poll() is None
    assert uploads.reading == checkpoints.path(1)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]
    assert waited(uploads) == []
    run = RemoteRun(there)
    assert steps(run.checkpoints()) == [1, 3], "2 waited, and then 3 did"
    assert checksums.damage(tmp_path / "there" / "checkpoints" / "step_00000003") is None
    checkpoints.save(state, loader=LOADER, wait=True)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
    assert "uploaded step_00000003" in (folder / "logs" / "upload.log").read_text()


def test_an_upload_that_fails_is_told(tmp_path: Path) -> None:
    folder, there = run_of(tmp_path / "run", 10, 20), tmp_path / "there"
    there.write_text("a file, where a folder should be")
    uploads = Uploads(folder, f"file://{there}", KEEP)
    uploads.add(folder / "checkpoints" / "step_00000010")
    ((step, why),) = waited(uploads)
    assert step == 10
    assert uploads.failed == why
    assert why.startswith(f"cannot upload step_00000010 to file://{there}: NotADirectoryError: ")
    there.unlink()
    uploads.add(folder / "checkpoints" / "step_00000020")
    assert waited(uploads) == []
    assert uploads.failed is None
    assert steps(RemoteRun(f"file://{there}").checkpoints()) == [20]
