from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from clipq.build import build_run, build_writers
from clipq.config.hydra import configs_dir, register, to_job
from clipq.config.schema import TrainJob
from clipq.dist.env import distributed
from clipq.log.console import Console
from clipq.train.loop import NonFiniteLossError, Normalize, Run, due, train
from tests.helpers import read_metrics


def run_of(arch: Path, shards: list[str], *overrides: str) -> Run:
    register({})
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *(f"model.name={arch}", f"data.shards=[{','.join(shards)}]", "name=x", "batch_size=8", "steps=6"),
                *("backend=fp32", "data.workers=0", "device=cpu", "log.every=2", "optim.clip_norm=1.0", *overrides),
            ],
        )
    job = to_job(cfg, TrainJob)
    with distributed("cpu") as env:
        run = build_run(job, env, Path("run"), "", Console(enabled=False))
        run.writers = build_writers(job, Path("run"), env, step=0, config={})
        return run


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
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 4"):
        train(run)
    poison.remove()
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step_00000002"]
    assert read_metrics(Path("run"))[-1]["loss"] is None, "JSON has no NaN"


def test_profile_is_written(arch: Path, shards: list[str]) -> None:
    import gzip

    train(run_of(arch, shards, "log.profile=[3,4]"))
    (trace,) = Path("run/profile").iterdir()
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    names = [e["name"] for e in events if e.get("ph") == "X"]
    assert sum(n.startswith("ProfilerStep#") for n in names) == 2
    assert any("addmm" in n for n in names)
