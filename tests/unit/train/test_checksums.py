"""Checkpoints whose files are not what was written: told of and passed over, never at the cost of the last good one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from clipq.train.checkpoint import CheckpointError, load, set_aside_damaged
from clipq.train.checksums import damage
from clipq.train.kept import newest
from tests.unit.train.saves import ENV, LOADER, fill, filled_state, names, saver, values

FILES = ("checksums.json", "config.yaml", "model.safetensors", "open_clip_config.json", "state.pt")
DAMAGES = ("missing", "cut", "a flipped bit")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    state, checkpoints = filled_state(), saver(tmp_path / "c", keep_last=3)
    for step in (1, 2, 3):
        fill(state, step)
        checkpoints.save(state, loader=LOADER, wait=True)
    return tmp_path / "c"


def spoil(file: Path, how: str, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    place = int(at * (len(content) - 1))
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:place])
    else:
        content[place] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong(name: str, how: str, folder: Path) -> None:
    """The start, the end and anywhere between."""
    path, chance = folder / "step_00000003", random.Random(0)
    assert names(path) == sorted(FILES)
    assert damage(path) is None
    for at in (0.0, chance.random(), chance.random(), 1.0):
        content = (path / name).read_bytes()
        spoil(path / name, how, at)
        found = damage(path)
        assert found is not None
        if name != "checksums.json":  # what it says of another file may be what has changed
            says = {"missing": "is missing", "cut": "bytes were|were written", "a flipped bit": "has changed since"}[
                how
            ]
            assert name in found
            assert any(part in found for part in says.split("|"))
        (path / name).write_bytes(content)
    assert damage(path) is None


def test_the_run_goes_on_from_the_one_before(folder: Path) -> None:
    spoil(folder / "step_00000003" / "state.pt", "cut")
    spoil(folder / "step_00000002" / "model.safetensors", "missing")
    told = set_aside_damaged(folder)
    assert len(told) == 2
    assert "step_00000003 is damaged: state.pt has" in told[0]
    assert told[0].endswith("It is now damaged_step_00000003, and the run goes on from step_00000001")
    assert "step_00000002 is damaged: model.safetensors is missing" in told[1]
    found = newest(folder)
    assert found == folder / "step_00000001"
    state = filled_state()
    load(folder / "step_00000001", state, ENV)
    assert values(state) == {1}
    assert set_aside_damaged(folder) == [], "it is told once"


def test_where_none_is_whole_all_stay(folder: Path) -> None:
    for step, how in zip((1, 2, 3), DAMAGES, strict=True):
        spoil(folder / f"step_{step:08d}" / "state.pt", how)
    with pytest.raises(ValueError, match=r"no checkpoint of this run is whole: .*3: state\.pt has changed.*2: .*1: "):
        set_aside_damaged(folder)
    assert names(folder) == [f"step_{step:08d}" for step in (1, 2, 3)]


def test_where_there_is_none(tmp_path: Path) -> None:
    assert set_aside_damaged(tmp_path / "none") == []


def test_damaged_ones_do_not_push_out_the_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go when their step is saved again, and the good one when another is whole."""
    for step in (2, 3):
        spoil(folder / f"step_{step:08d}" / "state.pt", "a flipped bit")
    set_aside_damaged(folder)
    checkpoints, state = saver(folder, keep_last=1), filled_state()

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    fill(state, 2)
    with monkeypatch.context() as patch:
        patch.setattr("clipq.train.checkpoint.write_weights", fails)
        with pytest.raises(CheckpointError):
            checkpoints.save(state, loader=LOADER, wait=True)
    assert names(folder) == ["damaged_step_00000002", "damaged_step_00000003", "step_00000001"]
    checkpoints.save(state, loader=LOADER, wait=True)
    assert names(folder) == ["damaged_step_00000003", "step_00000002"]
    fill(state, 3)
    checkpoints.save(state, loader=LOADER, wait=True)
    assert names(folder) == ["step_00000003"]
    assert damage(folder / "step_00000003") is None


def test_damaged_again(folder: Path) -> None:
    """The same step has been set aside before."""
    shutil.copytree(folder / "step_00000003", folder / "damaged_step_00000003")
    spoil(folder / "step_00000003" / "state.pt", "missing")
    assert len(set_aside_damaged(folder)) == 1
    assert names(folder) == ["damaged_step_00000003", "step_00000001", "step_00000002"]


def test_a_step_that_is_there_is_replaced(folder: Path) -> None:
    state = filled_state()
    fill(state, 3)
    state.samples = 7
    saver(folder, keep_last=3).save(state, loader=LOADER, wait=True)
    load(folder / "step_00000003", state, ENV)
    assert state.samples == 7
    assert names(folder) == [f"step_{step:08d}" for step in (1, 2, 3)]
