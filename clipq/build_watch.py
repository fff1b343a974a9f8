"""Puts the instruments and the guard of a run together from its configuration."""

from __future__ import annotations

import torch
from torch import nn

from clipq.config.checks import ConfigError
from clipq.config.choices import Precision
from clipq.config.schema import TrainJob
from clipq.config.watch import WatchConfig
from clipq.dist.env import DistEnv
from clipq.optim.stable_adamw import StableAdamW
from clipq.train.guard import Guard
from clipq.watch.instruments import FeatureWatch, Watch
from clipq.watch.rms import RmsWatch, choose


def build_watch(
    model: nn.Module, optimizer: torch.optim.AdamW | StableAdamW, config: WatchConfig, env: DistEnv, *, recorded: bool
) -> Watch:
    try:
        chosen = choose(model, config.rms)
    except ValueError as error:
        raise ConfigError(f"watch.rms={config.rms}: {error}") from error
    return Watch(
        rms=RmsWatch(chosen, optimizer) if chosen else None,
        parameters=chosen if config.norms else {},
        features=FeatureWatch(model, env.device) if config.features else None,
        every=config.every,
        always=recorded,
    )


def build_guard(model: nn.Module, job: TrainJob) -> Guard:
    return Guard(
        [name for name, _ in model.named_parameters()],
        policy=job.guard.policy,
        rise=job.guard.rise,
        limit=job.guard.limit,
        scaling=job.backend.precision is Precision.fp16,
    )
