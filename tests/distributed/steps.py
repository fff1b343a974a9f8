"""A tiny model trained for a few steps by the trainer's own step, on whole batches or on a rank's part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipq.build import build_run
from clipq.config.hydra import composed, register, to_job
from clipq.config.schema import TrainJob
from clipq.dist.env import DistEnv
from clipq.log.console import Console
from clipq.optim.shards import whole
from clipq.train.loop import train_step
from clipq.train.run import Pending, Run
from tests.helpers import TINY_ARCH

PAIRS = 12


def job_in(folder: Path, *overrides: str) -> TrainJob:
    """A job on the tiny model and the shards in the folder, in fp32."""
    register({})
    cfg = composed(
        "train",
        [
            *(f"model.name={folder}/tiny.json", f"data.shards={folder}/*.tar", "name=x", f"batch_size={PAIRS}"),
            *("backend=fp32", "optim.clip_norm=1.0", *overrides),
        ],
    )
    return to_job(cfg, TrainJob)


def whole_batches(steps: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    length = TINY_ARCH["text_cfg"]["context_length"]
    return [
        {
            "image": torch.randint(0, 256, (PAIRS, 3, 16, 16), generator=g, dtype=torch.uint8),
            "text": torch.randint(1, 49408, (PAIRS, length), generator=g, dtype=torch.int32),
            "key": [str(n) for n in range(PAIRS)],
            "lost": 0,
            "filtered": {},
            "sources": {},
        }
        for _ in range(steps)
    ]


def take_steps(run: Run, batches: list[dict[str, Any]], lr: float = 1e-3) -> list[Pending]:
    """Steps on this rank's part of the batches."""
    per_rank = PAIRS // run.env.world_size
    mine = slice(run.env.rank * per_rank, (run.env.rank + 1) * per_rank)
    return [train_step(run, batch | {k: batch[k][mine] for k in ("image", "text", "key")}, lr=lr) for batch in batches]


def losses_of(steps: list[Pending]) -> Tensor:
    return torch.stack([step.numbers[0] for step in steps])


def run_in(folder: Path, env: DistEnv, name: str, *overrides: str) -> Run:
    """A run of `job_in`, whose run folder has the name."""
    return build_run(job_in(folder, *overrides), env, folder / "runs" / name, "", Console(enabled=False))


def weights_of(run: Run) -> dict[str, Tensor]:
    """A copy of all parameters, whole. Collective."""
    return {name: whole(t.detach()).clone() for name, t in run.state.model.named_parameters()}


def flat(weights: dict[str, Tensor]) -> Tensor:
    """All weights as one vector, without those whose gradient is rounding noise alone: biases of keys."""
    parts = []
    for name, t in weights.items():
        if name.endswith("attn.in_proj.bias"):
            query, _, value = t.chunk(3)
            parts += [query, value]
        else:
            parts.append(t.flatten())
    return torch.cat(parts)
