from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from clipq.dist.env import DistEnv
from clipq.model.clip import create_model
from clipq.optim import FixedLossScaler, StableAdamW
from clipq.train.checkpoint import CheckpointError, Checkpoints, load
from clipq.train.kept import Keep, newest
from clipq.train.state import TrainState

ENV = DistEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
LOADER = {"workers": 2, "world_size": 1}


def new_state(arch: Path, seed: int) -> TrainState:
    torch.manual_seed(seed)
    model = create_model(str(arch)).model
    return TrainState(
        model, torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu", enabled=False)
    )


def step(state: TrainState) -> float:
    """One optimizer step on random input from torch's generator, so that the generator's state shows too."""
    out = state.model(torch.randn(4, 3, 16, 16), torch.randint(1, 100, (4, 8)))
    loss = (out["image_features"] - out["text_features"]).square().sum() * out["logit_scale"]
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return loss.item()


def checkpoints(folder: Path, **options: int) -> Checkpoints:
    settings = {"every": 0, "minutes": 0, "keep_last": 2, "keep_every": 0} | options
    keep = Keep(settings.pop("keep_last"), settings.pop("keep_every"))
    return Checkpoints(folder, ENV, keep=keep, uploads=None, config="steps: 1\n", architecture="{}", **settings)


def test_loaded_state_goes_on_exactly(arch: Path, tmp_path: Path) -> None:
    state = new_state(arch, seed=0)
    for _ in range(3):
        step(state)
    state.samples, state.seconds = 12, 3.5
    checkpoints(tmp_path / "c").save(state, loader=LOADER, wait=True)
    expected = [step(state) for _ in range(3)]

    other = new_state(arch, seed=1)
    found = newest(tmp_path / "c")
    assert found is not None
    assert load(found, other, ENV) == LOADER
    assert (other.step, other.samples, other.seconds) == (3, 12, 3.5)
    assert [step(other) for _ in range(3)] == expected


def test_which_are_kept(arch: Path, tmp_path: Path) -> None:
    state = new_state(arch, seed=0)
    saver = checkpoints(tmp_path / "c", keep_last=2, keep_every=20)
    for state.step in (10, 20, 30, 40, 50, 60, 70):
        saver.save(state, loader=LOADER, wait=True)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [f"step_{s:08d}" for s in (20, 40, 60, 70)]


def test_due() -> None:
    saver = checkpoints(Path("c"), every=10)
    assert [s for s in range(1, 31) if saver.due(s, ask_clock=True)] == [10, 20, 30]
    by_clock = checkpoints(Path("c"), minutes=1)
    assert not by_clock.due(5, ask_clock=True)
    by_clock._saved_at -= 61
    assert by_clock.due(5, ask_clock=True)
    assert not by_clock.due(5, ask_clock=False)


FAULTS = {
    "full, from Python": ("torch.save", OSError(28, "No space left on device"), "the disk is full: make room"),
    "over the quota": ("torch.save", OSError(122, "Disk quota exceeded"), "the disk is full: make room"),
    "full, from safetensors": (
        "clipq.model.weights.save_file",
        SafetensorError("I/O error: No space left on device (os error 28)"),
        "the disk is full: make room",
    ),
    "torch's writer": ("torch.save", RuntimeError("[enforce fail at inline_container.cc:858]"), "inline_container"),
    "no permission": ("clipq.model.weights.save_file", SafetensorError("Permission denied"), "Permission denied"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_failed_write_leaves_what_was_there(
    name: str, arch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, fault, says = FAULTS[name]
    state = new_state(arch, seed=0)
    saver = checkpoints(tmp_path / "c")
    state.step = 1
    saver.save(state, loader=LOADER, wait=True)

    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(function, fails)
    state.step = 2
    with pytest.raises(CheckpointError, match=rf"cannot write checkpoint .*step_00000002: .*{says}") as raised:
        saver.save(state, loader=LOADER, wait=True)
    assert ("the disk is full" in str(raised.value)) == says.startswith("the disk is full")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("layers", [3, 5, 8])
def test_full_disk(layers: int, small_disk: Path) -> None:
    """It fills up while the weights are written, or while the state of the optimizer is, which is twice as large."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(layers)))  # 256 KiB each
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), step=1)
    saver = checkpoints(small_disk / "c")
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(CheckpointError, match=r"step_00000001: the disk is full"):
        saver.save(state, loader=LOADER, wait=True)
    assert list((small_disk / "c").iterdir()) == []
    assert shutil.disk_usage(small_disk).free == free


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other content"])
def test_damaged_checkpoint(name: str, damage: str, arch: Path, tmp_path: Path) -> None:
    state = new_state(arch, seed=0)
    checkpoints(tmp_path / "c").save(state, loader=LOADER, wait=True)
    found = newest(tmp_path / "c")
    assert found is not None
    file = found / name
    content = file.read_bytes()
    file.unlink()
    if damage == "other content":
        torch.save({"step": 1}, file)
    elif damage != "missing":
        file.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    with pytest.raises(
        ValueError, match=rf"{name if file.exists() else ''}.*remove {found} to go on from the checkpoint"
    ):
        load(found, new_state(arch, seed=1), ENV)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_pickled_objects_are_not_run(arch: Path, tmp_path: Path) -> None:
    state = new_state(arch, seed=0)
    checkpoints(tmp_path / "c").save(state, loader=LOADER, wait=True)
    found = newest(tmp_path / "c")
    assert found is not None
    with zipfile.ZipFile(found / "state.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3")
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        load(found, state, ENV)
    assert not Path("pwned").exists()


def test_only_whole_checkpoints_are_found(tmp_path: Path) -> None:
    for name in ("step_00000010", ".part_step_00000020", "step_30", "step_00000009"):
        (tmp_path / name).mkdir()
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "step_00000010"
    assert newest(tmp_path / "none") is None


@pytest.mark.parametrize("enabled", [True, False])
def test_another_loss_scaler_begins_anew(enabled: bool, arch: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a fixed scale, or none, to torch's dynamic one."""
    state, other = new_state(arch, seed=0), new_state(arch, seed=1)
    if enabled:
        state.scaler = FixedLossScaler(state.model.named_parameters())
    step(state)
    other.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with caplog.at_level("WARNING"):
        other.load_state_dict(state.state_dict(), rank=0, world_size=1)
    assert other.scaler.get_scale() == 128
    assert "no dynamic loss scale: it begins at 128" in caplog.text


def test_the_settings_of_now_count_while_a_state_is_loaded(arch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `fused` torch decides on which device the counts of steps are; StableAdamW's state says nothing of it."""
    state, other = new_state(arch, seed=0), new_state(arch, seed=1)
    state.optimizer = StableAdamW(state.model.parameters())
    step(state)
    seen: list[dict[str, Any]] = []
    load_state = torch.optim.AdamW.load_state_dict
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda o, s: (seen.append(s), load_state(o, s)))
    other.load_state_dict(state.state_dict(), rank=0, world_size=1)
    assert [group["fused"] for group in seen[0]["param_groups"]] == [True]
    step(other)
