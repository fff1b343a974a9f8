"""The losses on several gloo processes against the naive ones on the whole batch."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipq.dist.env import distributed
from clipq.loss.contrastive import contrastive_loss
from clipq.loss.sigmoid import sigmoid_loss
from clipq.loss.tiles import TILE
from tests.helpers import run_distributed
from tests.unit.loss.naive import clip_loss_of_pairs, features, sigmoid_loss_of_images

LOSSES = {"softmax": (contrastive_loss, clip_loss_of_pairs), "siglip": (sigmoid_loss, sigmoid_loss_of_images)}
CASES = list(itertools.product(LOSSES, (1, 3, 5), (1, 7, 16, TILE)))
"""Loss, pairs on each rank and logits in a tile, which divide neither one another nor the matrix."""


def tensors(pairs: int, name: str) -> list[Tensor]:
    scalars = {"softmax": (30.0,), "siglip": (20.0, -7.0)}[name]
    return [*features(pairs), *(torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in scalars)]


def on_rank(folder: str) -> None:
    with distributed("cpu") as env:
        found = []
        for name, pairs, tile in CASES:
            image, text, *scalars = leaves = tensors(pairs * env.world_size, name)
            rows = slice(env.rank * pairs, (env.rank + 1) * pairs)
            loss, largest = LOSSES[name][0](image[rows], text[rows], *scalars, tile=tile)
            # a factor of each rank's own: none may weigh another's gradients with its own
            ((env.rank + 1) * loss).backward()
            found.append([loss.detach(), largest, *(t.grad for t in leaves)])
        torch.save(found, f"{folder}/{env.rank}.pt")


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_the_loss_of_the_whole_batch(world: int, tmp_path: Path) -> None:
    run_distributed(on_rank, world, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(world)]
    for case, (name, pairs, _) in enumerate(CASES):
        image, text, *scalars = leaves = tensors(pairs * world, name)
        losses = LOSSES[name][1](image, text, *scalars).view(world, pairs).mean(1)
        (losses * torch.arange(1, world + 1)).sum().backward()
        logits = scalars[0] * image @ text.T + sum(scalars[1:])
        largest = logits.detach().view(world, -1).amax(1)
        for rank in range(world):
            torch.testing.assert_close(ranks[rank][case][:2], [losses[rank].detach(), largest[rank]])
        for n, leaf in enumerate(leaves):
            total = torch.stack([ranks[rank][case][2 + n] for rank in range(world)]).sum(0)
            torch.testing.assert_close(total, leaf.grad, rtol=1e-12, atol=1e-14)
