"""When a step is recorded as a CUDA graph; the recording itself is tested on a GPU (tests/e2e/test_gpu.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clipq.build_backend import wants_graph
from clipq.config.checks import ConfigError
from clipq.config.choices import Strategy, Switch
from clipq.config.data import DataConfig
from clipq.config.groups import (
    BackendConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
)
from clipq.config.schema import TrainJob, check
from clipq.train.graph import WARMUP, Graphed

KEPT = {"visual": "a ResNet has convolutional blocks"}


def decide(
    switch: Switch = Switch.auto,
    device: str = "cuda",
    checkpointing: bool = False,
    kept: Any = (),
    accumulation: int = 1,
    strategy: Strategy = Strategy.ddp,
    distributed: bool = False,
) -> bool:
    job = SimpleNamespace(
        backend=SimpleNamespace(cuda_graph=switch),
        model=SimpleNamespace(grad_checkpointing=checkpointing),
        accumulation=accumulation,
        parallel=SimpleNamespace(strategy=strategy),
    )
    clip = SimpleNamespace(report=SimpleNamespace(kept=dict(kept)))
    env = SimpleNamespace(device=torch.device(device), is_distributed=distributed)
    return wants_graph(job, clip, env)  # pyright: ignore[reportArgumentType]


def test_auto_records_where_nothing_needs_the_host() -> None:
    assert decide()
    assert decide(distributed=True)


def test_hybrid_shards_are_recorded_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clipq")
    assert decide(strategy=Strategy.fsdp, distributed=True)
    assert decide(strategy=Strategy.hsdp), "one process has no shards"
    assert not caplog.messages
    assert not decide(strategy=Strategy.hsdp, distributed=True)
    assert "by backend.cuda_graph=on only" in caplog.text
    assert decide(Switch.on, strategy=Strategy.hsdp, distributed=True)


@pytest.mark.parametrize("obstacle", [{"device": "cpu"}, {"checkpointing": True}, {"kept": KEPT}])
def test_auto_does_not_record_elsewhere(obstacle: dict[str, Any]) -> None:
    assert not decide(**obstacle)


def test_on_and_off_are_obeyed() -> None:
    assert decide(Switch.on, kept=KEPT)
    assert not decide(Switch.off)


def test_accumulation_is_not_recorded_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clipq")
    assert not decide(accumulation=4)
    assert caplog.messages == ["accumulation=4: steps are not recorded as a CUDA graph"]
    caplog.clear()
    assert not decide(accumulation=4, device="cpu")
    assert not caplog.messages, "without accumulation it would not be recorded either"

    job = TrainJob(
        name="x",
        model=ModelConfig(name="ViT-B-32"),
        data=DataConfig(shards="x.tar"),
        backend=BackendConfig(cuda_graph=Switch.on),
        optim=OptimConfig(),
        schedule=ScheduleConfig(),
        parallel=ParallelConfig(),
        log=LogConfig(),
    )
    check(job, world_size=1, local_world_size=1, capability=(9, 0))
    job.accumulation = 4
    with pytest.raises(ConfigError, match=r"cuda_graph=on with accumulation=4: .*; choose one"):
        check(job, world_size=1, local_world_size=1, capability=(9, 0))


def test_first_calls_are_the_function_itself() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return 2 * x

    graphed = Graphed(function, before_recording=lambda: seen.clear(), device=torch.device("cpu"))
    for n in range(WARMUP):
        assert graphed(torch.tensor(float(n))).item() == 2 * n
    assert len(seen) == WARMUP
    assert not graphed.recorded
