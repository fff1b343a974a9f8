"""Checkpoints of a model of a few matrices, for tests of how they are saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from clipq.dist.env import DistEnv
from clipq.train.checkpoint import Checkpoints
from clipq.train.kept import Keep
from clipq.train.state import TrainState

ENV = DistEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
LOADER = {"lanes": 2, "world_size": 1}


def filled_state(step: int = 0, layers: int = 3) -> TrainState:
    """Weights and moments, three times 256 KiB a layer, all of which are the number of the step."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    fill(state, step)
    return state


@torch.no_grad()
def fill(state: TrainState, step: int) -> None:
    state.step = step
    for p in state.model.parameters():
        for tensor in (p, state.optimizer.state[p]["exp_avg"], state.optimizer.state[p]["exp_avg_sq"]):
            tensor.fill_(step)


def values(state: TrainState) -> set[float]:
    """All numbers of weights and moments: that of the step alone, if they are of one step."""
    tensors = [t for p in state.model.parameters() for t in (p, *state.optimizer.state[p].values()) if t.ndim]
    return {value for t in tensors for value in t.unique().tolist()}


def saver(folder: Path, **options: int) -> Checkpoints:
    settings = {"every": 0, "minutes": 0, "keep_last": 2, "keep_every": 0} | options
    keep = Keep(settings.pop("keep_last"), settings.pop("keep_every"))
    return Checkpoints(folder, ENV, keep=keep, uploads=None, config="steps: 1\n", architecture="{}", **settings)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
