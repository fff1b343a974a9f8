"""The guard's three policies on real runs: not finite at a chosen step, a loss bomb, a bad batch told by its keys."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipq.config.choices import GuardPolicy
from clipq.data.loader import StreamPlace
from clipq.dist.env import distributed
from clipq.optim import FixedLossScaler
from clipq.train.guard import Guard, gradient_norms, total_norm
from clipq.train.kept import newest
from clipq.train.loop import train
from clipq.train.run import DivergedError, Run
from tests.helpers import colour_samples, colour_shards, encode, read_metrics, run_distributed, tiny_arch, write_shard
from tests.unit.train import runs

NAN = "nan"
BOMB = "bomb"


def run_of(arch: Path, shards: list[str], *overrides: str, folder: str = "run") -> Run:
    with distributed("cpu") as env:
        return runs.run_of(arch, shards, *overrides, env=env, folder=Path(folder))


def spoil(run: Run, kind: str, when: Callable[[Tensor], bool]) -> None:
    """Makes the model's output NaN, or its loss enormous, for the batches of images that `when` picks."""

    def hook(model: Any, inputs: tuple[Tensor, ...], out: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not when(inputs[0]):
            return None
        if kind == NAN:
            return out | {"text_features": out["text_features"] * math.nan}
        return out | {"logit_scale": out["logit_scale"] * 50}

    run.model.register_forward_hook(hook)


def at_step(run: Run, step: int) -> Callable[[Tensor], bool]:
    return lambda images: run.state.step + 1 == step


def weights_after_each_step(run: Run) -> list[Tensor]:
    seen: list[Tensor] = []
    weight = run.state.model.get_parameter("visual.proj")
    run.state.optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    return seen


def events(folder: str = "run") -> list[dict[str, Any]]:
    return read_metrics(Path(folder), "event")


@pytest.mark.parametrize("optimizer", ["adamw", "stable_adamw"])
@pytest.mark.parametrize("kind", [NAN, BOMB])
def test_skip_makes_no_update_and_goes_on(kind: str, optimizer: str, arch: Path, shards: list[str]) -> None:
    """StableAdamW on a CPU cannot leave a step out by itself, torch's fused AdamW can."""
    watching = ("watch.every=1", "watch.ignore=1")
    run = run_of(arch, shards, f"optim={optimizer}", "guard.policy=skip", "guard.rise=3", *watching)
    spoil(run, kind, at_step(run, 4))
    conv = run.state.model.get_parameter("visual.conv1.weight")
    before: list[Tensor] = []
    run.model.register_forward_pre_hook(lambda *_: before.append(conv.detach().clone()))
    train(run)
    moved = [not torch.equal(a, b) for a, b in zip(before, [*before[1:], conv.detach()], strict=True)]
    assert moved == [True, True, True, False, True, True]
    (event,) = events()
    assert (event["event"], event["step"]) == ("bad step", 4)
    if kind == NAN:
        assert (event["reason"], event["tensor"]) == ("the loss is nan", "text_features")
    else:
        assert "above the bound of" in event["reason"]
    rows = read_metrics(Path("run"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["rms"]["visual.conv1.weight"] is not None for row in rows] == moved, "no RMS_t of what was not done"
    assert {int(s["step"]) for s in run.state.optimizer.state.values()} == {5}
    assert all(s["exp_avg"].isfinite().all() for s in run.state.optimizer.state.values())


def test_a_gradient_that_is_not_finite_is_named(arch: Path, shards: list[str]) -> None:
    """The loss is fine; a NaN that begins in the second of two blocks goes on to the first."""
    run = run_of(arch, shards, "guard.policy=skip")
    block = run.state.model.get_submodule("visual.transformer.resblocks.1")
    block.register_full_backward_hook(  # of the gradient of its input: all before the block
        lambda module, grads, _: (grads[0] * math.nan,) if run.state.step + 1 == 3 else None
    )
    train(run)
    (event,) = events()
    assert event["step"] == 3
    assert event["reason"].startswith("gradients of ")
    assert event["tensor"].startswith("visual.transformer.resblocks.0."), "the nearest to where it began"
    assert all(math.isfinite(row["loss"]) for row in read_metrics(Path("run")))


def test_the_first_block_that_is_not_finite_is_named(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "guard.policy=skip", "watch.every=3")
    names = [f"visual.transformer.resblocks.{n}" for n in range(2)]
    mlp = run.state.model.get_submodule(f"{names[1]}.mlp.c_fc")
    mlp.register_forward_hook(lambda module, x, y: y * math.nan if run.state.step + 1 in (2, 3) else None)
    train(run)
    assert [e["tensor"] for e in events()] == ["image_features", names[1]], "blocks are seen at watched steps"


def test_keys_that_are_no_utf8_are_written_too(arch: Path, shards: list[str]) -> None:
    """A tar may hold any bytes; the first rank alone writes, and its end would leave the others waiting."""
    run = run_of(arch, shards, "guard.policy=skip")
    loader = run.loader

    def named(place: object) -> Any:
        for batch in loader(place):
            yield batch | {"key": ["caf\udce92.tar/\n"] * len(batch["key"])}

    run.loader = named
    spoil(run, NAN, at_step(run, 2))
    train(run)
    assert r"caf\udce92.tar/" in Path("run/bad_batches/step_00000002.txt").read_text()


@pytest.mark.parametrize("kind", [NAN, BOMB])
def test_stop_keeps_what_was_good(kind: str, arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "guard.rise=3", "watch.ignore=1", "checkpoint.every=2", "steps=12")
    spoil(run, kind, at_step(run, 3))
    with pytest.raises(
        DivergedError, match=r"the loss is .* at step 3 \(its samples: .*step_00000003.txt.*step_00000002, has"
    ):
        train(run)
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step_00000002"]
    assert read_metrics(Path("run"))[-1]["step"] == 4, "read at the next logged step"
    assert len(Path("run/bad_batches/step_00000003.txt").read_text().split()) == 8


def batches_at(run: Run, place: StreamPlace | None) -> int:
    return place.drawn // run.batch_size if place else 0


def poisoned(run: Run, positions: set[int]) -> None:
    """Makes the images of the batches at these positions of the stream all white."""
    inner = run.loader

    def loader(place: StreamPlace | None) -> Generator[dict[str, Any]]:
        for position, batch in enumerate(inner(place), start=batches_at(run, place)):
            yield batch | {"image": torch.full_like(batch["image"], 255)} if position in positions else batch

    run.loader = loader


def without(run: Run, positions: set[int]) -> None:
    inner = run.loader

    def loader(place: StreamPlace | None) -> Generator[dict[str, Any]]:
        for position, batch in enumerate(inner(place), start=batches_at(run, place)):
            if position not in positions:
                yield batch

    run.loader = loader


def all_white(images: Tensor) -> bool:
    return bool((images == images[:1, :, :1, :1]).all())  # normalized channel by channel


def test_rewind_goes_on_as_if_the_batches_had_not_been(arch: Path, shards: list[str]) -> None:
    """Step 5 is bad, seen at 6; the checkpoint of step 4 goes on with the batches after those."""
    settings = ("guard.policy=rewind", "checkpoint.every=2", "schedule=constant")
    run = run_of(arch, shards, *settings)
    poisoned(run, {4})
    spoil(run, NAN, all_white)
    train(run)
    assert (run.state.step, batches_at(run, run.state.place)) == (6, 8)
    assert [(e["event"], e["step"], e.get("to")) for e in events()] == [("bad step", 5, None), ("rewind", 6, 4)]
    other = run_of(arch, shards, *settings, folder="other")
    without(other, {4, 5})
    train(other)
    for (name, a), (_, b) in zip(run.state.model.named_parameters(), other.state.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    # and the place in the data is kept by the checkpoint
    run, other = (run_of(arch, shards, *settings, "steps=8", folder=folder) for folder in ("run", "other2"))
    assert (run.state.step, batches_at(run, run.state.place)) == (6, 8)
    without(other, {4, 5})
    train(run)
    train(other)
    assert torch.equal(run.state.model.get_parameter("visual.proj"), other.state.model.get_parameter("visual.proj"))


def test_rewind_passes_over_a_damaged_checkpoint(
    arch: Path, shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(arch, shards, "guard.policy=rewind", "checkpoint.every=2", "log.every=1", "steps=8")

    done: list[int] = []

    def once(images: Tensor) -> bool:
        if run.state.step != 5 or done:
            return False
        done.append(5)
        run.checkpoints.newest()  # written whole
        path = Path("run/checkpoints/step_00000004/model.safetensors")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return True

    spoil(run, NAN, once)
    train(run)
    assert [(e["event"], e.get("to")) for e in events()] == [("bad step", None), ("rewind", 2)]
    assert "step_00000004 is damaged" in caplog.text
    assert run.state.step == 8


def test_rewind_needs_a_checkpoint(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "guard.policy=rewind")
    spoil(run, NAN, at_step(run, 1))
    with pytest.raises(DivergedError, match=r"guard\.policy=rewind has nothing to go back to.*lower checkpoint"):
        train(run)


def test_two_bad_batches_of_one_step_are_both_told(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "guard.policy=rewind", "checkpoint.every=2", "log.every=1")
    poisoned(run, {2, 3})
    spoil(run, NAN, all_white)
    train(run)
    bad = [(e["step"], e["keys"]) for e in events() if e["event"] == "bad step"]
    assert bad == [(3, "bad_batches/step_00000003.txt"), (3, "bad_batches/step_00000003_2.txt")]
    first, second = (set(Path("run", keys).read_text().split()) for _, keys in bad)
    assert not first & second


def test_the_bound_holds_from_the_first_resumed_step_on(arch: Path, shards: list[str]) -> None:
    settings = ("guard.rise=3", "guard.policy=skip", "watch.ignore=1", "log.every=4", "checkpoint.every=4")
    train(run_of(arch, shards, *settings, "steps=4"))
    run = run_of(arch, shards, *settings, "steps=8")
    spoil(run, BOMB, at_step(run, 5))
    train(run)
    assert [e["step"] for e in events()] == [5]


def test_nothing_is_saved_after_a_refused_step(arch: Path, shards: list[str]) -> None:
    """Weights that are finite and give no finite loss would drive out those that are good."""
    run = run_of(arch, shards, "guard.policy=skip", "checkpoint.every=1", "checkpoint.keep_last=2", "steps=6")
    spoil(run, NAN, lambda _: run.state.step + 1 in (4, 5))
    train(run)
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["step_00000003", "step_00000006"]


def test_a_fixed_scale_and_a_loss_that_is_not_finite(arch: Path, shards: list[str]) -> None:
    """All gradients are gone then: it is a bad step, not the overflow of every tensor."""
    run = run_of(arch, shards, "guard.policy=skip", "steps=5")
    run.state.scaler = FixedLossScaler(run.state.model.named_parameters(), 8.0)
    run.guard._scaling = True
    spoil(run, NAN, at_step(run, 3))
    train(run)
    assert [(e["event"], e["step"]) for e in events()] == [("bad step", 3)]
    assert all(p.isfinite().all() for p in run.state.model.parameters())
    assert {int(s["step"]) for s in run.state.optimizer.state.values()} == {4}


def test_a_rewind_counts_once(arch: Path, shards: list[str]) -> None:
    """Of three bad steps that are read together."""
    run = run_of(arch, shards, "guard.policy=rewind", "guard.limit=2", "checkpoint.every=3", "log.every=6", "steps=8")
    poisoned(run, {3, 4, 5})
    spoil(run, NAN, all_white)
    train(run)
    assert run.state.step == 8
    assert [e["event"] for e in events()].count("rewind") == 1


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_the_guard_has_a_limit(policy: str, arch: Path, shards: list[str]) -> None:
    run = run_of(
        arch, shards, f"guard.policy={policy}", "guard.limit=3", "checkpoint.every=1", "log.every=1", "steps=30"
    )
    spoil(run, NAN, lambda _: run.state.step >= 2)
    with pytest.raises(DivergedError, match=r"as often as guard\.limit=3 allows"):
        train(run)
    assert [e["event"] for e in events()].count("bad step") == 3
    assert batches_at(run, run.state.place) == 5


def test_the_bad_sample_is_among_the_keys(arch: Path, tmp_path: Path) -> None:
    """A white picture in one shard; the model cannot bear it. Loader processes included."""
    white = encode(Image.fromarray(np.full((16, 16, 3), 255, np.uint8)))
    samples = colour_samples(40)
    samples[17] = {k: (white if isinstance(v, bytes) and _is_image(v) else v) for k, v in samples[17].items()}
    shard = str(write_shard(tmp_path / "data" / "x.tar", samples))
    run = run_of(
        arch, [shard], "guard.policy=skip", "data.workers=1", "data.augment.scale=[1,1]", "data.augment.ratio=[1,1]"
    )
    highest = run.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    spoil(run, NAN, lambda images: bool((images == highest).flatten(1).all(1).any()))
    train(run)
    assert 1 <= len(events()) <= 3, "one in five batches has it"
    for event in events():
        keys = Path("run", event["keys"]).read_text().splitlines()
        assert len(keys) == 8
        assert f"{shard}/000017" in keys


def _is_image(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).verify()
    except Exception:
        return False
    return True


def rank_of_two(folder: str, policy: str, kind: str) -> None:
    """Bad on the second rank alone."""
    shards = [f"{folder}/{n:05d}.tar" for n in range(2)]
    settings = ("guard.rise=3", "watch.ignore=1", "checkpoint.every=2", f"guard.policy={policy}")
    with distributed("cpu") as env:
        run = runs.run_of(Path(folder) / "tiny.json", shards, *settings, env=env, folder=Path(folder) / "run")
        poisoned(run, {4} if env.rank == 1 else set())
        spoil(run, kind, all_white)
        stopped = ""
        try:
            train(run)
        except DivergedError as error:
            stopped = str(error)
        state = {n: p.detach() for n, p in run.state.model.named_parameters()}
        batches = batches_at(run, run.state.place)
        torch.save({"stopped": stopped, "batches": batches, "weights": state}, f"{folder}/{env.rank}.pt")


@pytest.mark.parametrize("kind", [pytest.param(NAN, marks=pytest.mark.slow), BOMB])
@pytest.mark.parametrize(("policy", "batches"), [("stop", 6), ("skip", 6), ("rewind", 8)])
def test_two_processes_decide_alike(policy: str, batches: int, kind: str, tmp_path: Path) -> None:
    colour_shards(tmp_path, [30, 30])
    tiny_arch(tmp_path)
    run_distributed(rank_of_two, 2, str(tmp_path), policy, kind)
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert first["stopped"] == second["stopped"]
    assert bool(first["stopped"]) == (policy == "stop")
    assert first["batches"] == second["batches"] == batches
    for name, weight in first["weights"].items():
        assert weight.isfinite().all()
        assert torch.equal(weight, second["weights"][name]), name
    keys = (tmp_path / "run/bad_batches/step_00000005.txt").read_text().splitlines()
    assert len(keys) == 8, "of both ranks"
    assert len({key.rpartition("/")[0] for key in keys}) == 2, "each rank reads a shard of its own"
    newest_path = newest(tmp_path / "run/checkpoints")
    assert newest_path is not None
    assert newest_path.name == ("step_00000004" if policy == "stop" else "step_00000006")


def test_a_loss_scaler_decides_on_gradients() -> None:
    settings: dict[str, Any] = {"policy": GuardPolicy.skip, "rise": None, "limit": 3}
    overflow, fine = torch.tensor(math.inf), torch.tensor(1.0)
    assert Guard(["a"], scaling=False, **settings).judge(fine, overflow)
    assert not Guard(["a"], scaling=True, **settings).judge(fine, overflow)
    guard = Guard(["a"], scaling=True, **settings)
    assert guard.judge(overflow, fine)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for scaler in (FixedLossScaler([("p", p)], 2.0), torch.amp.GradScaler("cpu", init_scale=2.0)):
        for bad in (True, False):
            before, p.grad = p.detach().clone(), torch.ones(2)
            scaler.scale(torch.ones(()))  # torch's scaler begins with it
            scaler.unscale_(optimizer)
            guard.update(optimizer, scaler, torch.tensor(bad))
            scaler.update()
            assert torch.equal(p, before) is bad, "a loss that is not finite, with gradients that are"


def test_gradient_norms() -> None:
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((3,), (2, 2), ())]
    params[0].grad, params[2].grad = torch.tensor([3.0, 0.0, 4.0]), torch.tensor(-2.0)
    assert gradient_norms(params).tolist() == [5.0, 0.0, 2.0]
    params[1].grad = torch.full((2, 2), 0.5)
    assert gradient_norms(params).tolist() == [5.0, 1.0, 2.0]
    for p in params:
        p.grad = None
    assert gradient_norms(params).tolist() == [0.0, 0.0, 0.0]
    assert total_norm(torch.tensor([3e30, 4e30])).item() == pytest.approx(5e30)
    assert total_norm(torch.tensor([1.0, math.nan])).isnan()
