from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clipq.config.checks import ConfigError
from clipq.dist.env import distributed
from clipq.eval.common import Encoder, EvalError, EvalResult
from clipq.log.writers import scalars
from clipq.lowp.linear import LowpLinear
from clipq.model.clip import create_model
from clipq.optim.loss_scale import FixedLossScaler
from clipq.train import events
from clipq.train.loop import due, owed, train
from clipq.train.run import DivergedError, Normalize, Run
from tests.helpers import read_metrics
from tests.unit.train import runs


def run_of(arch: Path, shards: list[str], *overrides: str) -> Run:
    with distributed("cpu") as env:
        return runs.run_of(arch, shards, *overrides, env=env)


def test_due() -> None:
    assert [s for s in range(1, 11) if due(s, 4, 10)] == [4, 8, 10]
    assert [s for s in range(1, 11) if due(s, 0, 10)] == [10]


def test_normalize_is_openclips_transform() -> None:
    from torchvision.transforms.v2.functional import normalize, to_dtype

    image = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    expected = normalize(to_dtype(image, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(Normalize(mean, std, torch.device("cpu"))(image), expected)


def test_metrics_of_every_step(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "schedule.warmup=2", "max_logit_scale=14.0")
    train(run)
    rows = read_metrics(Path("run"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["samples"] for row in rows] == [8, 16, 24, 32, 40, 48]
    assert [row["lr"] for row in rows] == [run.schedule(s) for s in range(1, 7)]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert ["images_per_second" in row for row in rows] == [False, True] * 3
    assert all(0 <= row["data_wait"] <= 1 for row in rows if "data_wait" in row)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    # it starts at 1/0.07 and is clamped from the first step on
    assert rows[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert all(row["logit_scale"] <= 14.0 + 1e-4 for row in rows[1:])


def test_what_filters_leave_out_is_told(arch: Path, shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Of the samples 0 to 72 half are left; the summary comes at the first line, and where the run is twice as far."""
    caplog.set_level("INFO", "clipq")
    train(run_of(arch, shards, "++data.filter.json.n=[0,36]", "data.shuffle=1", "steps=14", "log.every=1"))
    rows = read_metrics(Path("run"))
    counts = [row.get("filtered", {}).get("json.n", 0) for row in rows]
    assert sum(counts) == pytest.approx(14 * 8 * 36 / 37, abs=40)
    assert all("filtered" not in row or row["filtered"]["json.n"] > 0 for row in rows)
    told = [r.getMessage() for r in caplog.records if "were left out" in r.getMessage()]
    steps = (1, 2, 4, 8)
    expected = []
    for step in steps:
        out = sum(counts[:step])
        if out:
            whole = out + 8 * step
            expected.append(f"{out:,} of {whole:,} samples were left out since step 0: json.n {out:,}")
    assert told == expected
    assert len(told) >= 3
    assert scalars(rows[-1] | {"filtered": {"json.n": 3}})["filtered/json.n"] == 3
    assert "filtered" not in read_metrics(Path("run"))[0] or counts[0]


def test_siglip_trains_scale_and_bias(arch: Path, shards: list[str]) -> None:
    """Its checkpoint is a SigLIP model of OpenCLIP, which only this loss trains on."""
    run = run_of(arch, shards, "loss=siglip", "optim.lr=1e-2", "steps=20")
    train(run)
    rows = read_metrics(Path("run"))
    assert rows[0]["logit_scale"] == pytest.approx(10)
    assert rows[0]["loss"] == pytest.approx(10, abs=10)  # the matching pair's: the others have next to none
    assert rows[-1]["loss"] < rows[0]["loss"] - 2
    model = create_model("run/checkpoints/step_00000020/open_clip_config.json", pretrained="run").model
    bias = model.state_dict()["logit_bias"]
    assert torch.equal(bias, run.state.model.get_parameter("logit_bias").detach())
    assert abs(bias + 10) > 0.01
    with pytest.raises(ConfigError, match="choose loss=siglip"):
        run_of(Path("run/checkpoints/step_00000020/open_clip_config.json"), shards)


def test_samples_of_each_source_are_told(arch: Path, shards: list[str]) -> None:
    sources = f"{{a: {{shards: [{shards[0]}, {shards[1]}], weight: 3}}, b: {{shards: {shards[2]}}}}}"
    train(run_of(arch, shards, "data=mix", "data.shards=null", f"++data.sources={sources}"))
    rows = read_metrics(Path("run"))
    assert [row["sources"].keys() for row in rows] == [{"a", "b"}] * 6
    assert all(sum(row["sources"].values()) == 8 for row in rows)
    assert sum(row["sources"]["a"] for row in rows) == pytest.approx(36, abs=3)
    assert all("filtered" not in row for row in rows)


def test_clipping_bounds_the_update(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards)
    norms = []
    run.state.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in run.state.model.parameters() if p.grad is not None])
        )
    )
    train(run)
    before = [row["grad_norm"] for row in read_metrics(Path("run"))]
    assert max(before) > 1.0, "nothing was clipped: the test shows nothing"
    for norm, unclipped in zip(norms, before, strict=True):
        assert norm.item() == pytest.approx(min(1.0, unclipped), rel=1e-4)


def test_non_finite_loss_stops_before_it_is_saved(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "checkpoint.every=2", "log.every=5")
    poison = run.state.optimizer.register_step_post_hook(
        lambda *_: run.state.model.logit_scale.data.fill_(float("nan")) if run.state.step == 2 else None  # pyright: ignore
    )
    with pytest.raises(DivergedError, match="the loss is nan, first in logit_scale, at step 4"):
        train(run)
    poison.remove()
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step_00000002"]
    assert read_metrics(Path("run"))[-1]["loss"] is None, "JSON has no NaN"


@pytest.mark.parametrize("before", [True, False], ids=["after a save", "before any"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_of_an_exploded_update_are_not_saved(bad: float, before: bool, arch: Path, shards: list[str]) -> None:
    """The loss of the step whose update explodes is still good."""
    run = run_of(arch, shards, f"checkpoint.every={2 if before else 4}")
    weight = run.state.model.get_parameter("visual.proj")
    run.state.optimizer.register_step_post_hook(
        lambda *_: weight.data[0, 0].fill_(bad) if run.state.step == 3 else None  # of the step that follows
    )
    says = (
        "the newest checkpoint, run/checkpoints/step_00000002, has finite" if before else "there is no checkpoint yet"
    )
    with pytest.raises(DivergedError, match=f"weights are not finite after step 4, .*lower optim.lr.*; {says}"):
        train(run)
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step_00000002"] * before
    assert all(math.isfinite(row["loss"]) for row in read_metrics(Path("run")))


def test_model_trains_whatever_mode_it_comes_in(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "steps=2")
    run.model.eval()
    modes = []
    run.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train(run)
    assert modes == [True, True]


def test_logit_scale_is_at_least_one(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "steps=3")
    run.state.model.get_parameter("logit_scale").data.fill_(-3.0)
    train(run)
    scales = [row["logit_scale"] for row in read_metrics(Path("run"))]
    assert scales[0] == pytest.approx(math.exp(-3))
    assert scales[1] == pytest.approx(1.0)


@dataclass
class Slow:
    """An evaluator that takes its time, and fails as long as it is told to."""

    seconds: float = 0.0
    fault: str | None = None
    task: str = "slow"
    ran: int = 0

    def check(self) -> None: ...

    def run(self, encoder: Encoder) -> EvalResult:
        time.sleep(self.seconds)
        self.ran += 1
        if self.fault:
            raise EvalError(self.fault)
        return EvalResult(self.task, "zero_shot", {"top1": 0.5})


def test_evaluation_is_no_training_time(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "eval.every=2")
    slow = Slow(seconds=0.3)
    run.evaluators = [slow]
    start = time.perf_counter()
    train(run)
    elapsed = time.perf_counter() - start
    assert slow.ran == 3
    assert 0 < read_metrics(Path("run"))[-1]["seconds"] <= elapsed - 3 * slow.seconds


def test_failed_evaluation_costs_no_training(arch: Path, shards: list[str]) -> None:
    """The last checkpoint lies there, and the same command evaluates it, the tasks that are not done yet alone."""
    run = run_of(arch, shards)
    run.evaluators = [Slow(task="good"), Slow(fault="evaluation slow: no image")]
    with pytest.raises(EvalError, match="evaluation slow: no image"):
        train(run)
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step_00000006"]
    weights = Path("run/checkpoints/step_00000006/model.safetensors").read_bytes()

    again = run_of(arch, shards)
    good, slow = Slow(task="good"), Slow()
    again.evaluators = [good, slow]
    assert owed(again) == [slow]
    train(again)
    assert (good.ran, slow.ran) == (0, 1)
    assert [(row["task"], row["step"]) for row in read_metrics(Path("run"), "eval")] == [("good", 6), ("slow", 6)]
    assert owed(again) == []
    assert [row["step"] for row in read_metrics(Path("run"))] == [1, 2, 3, 4, 5, 6]
    assert Path("run/checkpoints/step_00000006/model.safetensors").read_bytes() == weights


def test_nothing_is_owed_before_the_first_step(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "eval.every=2")
    run.evaluators = [Slow()]
    assert owed(run) == []


def test_profile_is_written(arch: Path, shards: list[str]) -> None:
    import gzip

    train(run_of(arch, shards, "log.profile=[3,4]"))
    (trace,) = Path("run/profile").iterdir()
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    names = [e["name"] for e in events if e.get("ph") == "X"]
    assert sum(n.startswith("ProfilerStep#") for n in names) == 2
    assert any("addmm" in n for n in names)


def test_resumed_run_keeps_the_profile(arch: Path, shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    train(run_of(arch, shards, "log.profile=[2,3]", "steps=4"))
    (trace,) = Path("run/profile").iterdir()
    before = trace.read_bytes()
    with caplog.at_level("INFO", "clipq"):
        train(run_of(arch, shards, "log.profile=[2,3]"))
    assert trace.read_bytes() == before
    assert "log.profile=[2, 3]: no profile, the run goes on after step 4" in caplog.text


def test_overflow_of_a_tensor_is_an_event(arch: Path, shards: list[str]) -> None:
    """As on a GPU in fp16; here the gradient is spoiled by a hook."""
    run = run_of(arch, shards)
    run.state.scaler = FixedLossScaler(run.state.model.named_parameters(), 1024.0)
    name = "visual.conv1.weight"
    spoiled, calls = run.state.model.get_parameter(name), []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        calls.append(spoiled.detach().clone())
        return grad * (math.inf if len(calls) == 3 else 1)

    spoiled.register_hook(spoil)
    train(run)
    rows = read_metrics(Path("run"), kind="event")
    assert rows == [{"kind": "event", "step": 3, "event": "gradient overflow", "parameters": [name]}]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise([*calls, spoiled.detach()])]
    assert moved == [True, True, False, True, True, True]
    assert run.state.scaler.skipped == {name: 1}


def test_a_tensor_that_overflows_without_end_ends_the_run(
    arch: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_OVERFLOWS", 4)
    run = run_of(arch, shards, "log.every=2")
    run.state.scaler = FixedLossScaler(run.state.model.named_parameters(), 1024.0)
    calls: list[int] = []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad if len(calls) == 1 else grad * math.inf  # steps 2 to 6; looked at after each second

    run.state.model.get_parameter("visual.conv1.weight").register_hook(spoil)
    with pytest.raises(DivergedError, match=r"visual.conv1.weight is not trained.* last 5 steps, to step 6.*=1024"):
        train(run)
    assert len(read_metrics(Path("run"), kind="train")) == 6


@pytest.mark.parametrize("optimizer", ["adamw", "stable_adamw"])
def test_rms_goes_into_the_metrics(optimizer: str, arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, f"optim={optimizer}", "watch.every=2", "watch.rms=[visual.conv1.weight,logit_scale]")
    train(run)
    rows = read_metrics(Path("run"))
    assert ["rms" in row for row in rows] == [False, True] * 3
    for row in rows[1::2]:
        assert set(row["rms"]) == {"visual.conv1.weight", "logit_scale"}
        assert 0.1 < row["rms"]["visual.conv1.weight"] < 10
    assert scalars(rows[1])["rms/logit_scale"] == rows[1]["rms"]["logit_scale"]


def test_a_pattern_that_matches_nothing(arch: Path, shards: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"watch\.rms=.*'visual\.nothing\*' matches no trained parameter"):
        run_of(arch, shards, "watch.rms=[visual.nothing*]")


def test_nothing_is_watched_on_request(arch: Path, shards: list[str]) -> None:
    run = run_of(arch, shards, "watch.rms=[]", "watch.features=false", "watch.every=1")
    train(run)
    for row in read_metrics(Path("run")):
        assert not {"rms", "features", "parameter_norm", "update_norm"} & set(row)


def test_instruments_of_a_step(arch: Path, shards: list[str]) -> None:
    """Norms and magnitudes against what hooks on the model and copies of the weights say."""
    name = "visual.conv1.weight"
    run = run_of(arch, shards, "watch.every=2", f"watch.rms=[{name}]", "max_logit_scale=20.0")
    blocks = ("visual.transformer.resblocks.0", "visual.transformer.resblocks.1", "transformer.resblocks.0")
    weights, outputs = [], {}
    run.state.optimizer.register_step_pre_hook(
        lambda *_: weights.append(run.state.model.get_parameter(name).detach().clone())
    )
    for block in blocks:
        run.state.model.get_submodule(block).register_forward_hook(
            lambda module, inputs, y, block=block: outputs.setdefault(block, []).append(y.detach())
        )
    train(run)
    weights.append(run.state.model.get_parameter(name).detach())
    rows = read_metrics(Path("run"))
    assert ["features" in row for row in rows] == [False, True] * 3
    for step in (2, 4, 6):
        row = rows[step - 1]
        before, after = weights[step - 1], weights[step]
        assert row["parameter_norm"] == {name: pytest.approx(after.norm().item(), rel=1e-5)}
        assert row["update_norm"] == {name: pytest.approx((after - before).norm().item(), rel=1e-4)}
        assert set(row["features"]) == set(blocks)
        for block in blocks:  # the first of the 8 pairs
            assert row["features"][block] == pytest.approx(outputs[block][step - 1][:1].abs().mean().item(), rel=1e-5)
    assert scalars(rows[1])[f"update_norm/{name}"] == rows[1]["update_norm"][name]
    assert all(0 < abs(row["max_logit"]) <= 20.001 for row in rows)


def test_watching_changes_nothing(arch: Path, shards: list[str]) -> None:
    """Not one random number more is drawn, not one weight differs."""
    overrides = ("steps=4", "model.patch_dropout=0.5", "backend=switchback", "backend.precision=fp32")
    run = run_of(arch, shards, *overrides, "watch.every=1", "watch.quantization=2")
    train(run)
    (Path("run")).rename("watched")
    other = run_of(arch, shards, *overrides, "watch.rms=[]", "watch.features=false", "watch.quantization=0")
    train(other)
    for (name, a), (_, b) in zip(run.state.model.named_parameters(), other.state.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    rows = read_metrics(Path("watched"), "quantization")
    assert [row["step"] for row in rows] == [2, 4]
    layers = [n for n, m in run.state.model.named_modules() if isinstance(m, LowpLinear)]
    assert len(layers) == 12
    for row in rows:
        assert set(row["errors"]) == set(layers)
        assert all(1e-4 < error < 0.1 for error in row["errors"].values())
