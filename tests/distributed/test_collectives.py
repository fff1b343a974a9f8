"""Collectives on gloo processes."""

from __future__ import annotations

import pytest
import torch

from clipq.build import reported_as_config_error
from clipq.config.checks import ConfigError
from clipq.dist.env import distributed
from clipq.dist.gather import (
    all_gather_with_grad,
    exchange_with_grad,
    gather_objects,
    gather_rows,
    raised_on_every_rank,
)
from tests.helpers import run_distributed


def refuse(condition: bool) -> None:
    if condition:
        raise ValueError("of rank 1")


def collectives() -> None:
    with distributed("cpu") as env:
        r = env.rank
        # rank 0 has no row, rank 1 has one, rank 2 has two
        rows = gather_rows(torch.full((r, 2), float(r)))
        assert rows.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert gather_objects({"rank": r}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert env.broadcast_flag(r == 0) is True
        assert env.broadcast_flag(r != 0) is False
        with pytest.raises(ValueError, match="of rank 1"), raised_on_every_rank(ValueError):
            refuse(r == 1)
        with raised_on_every_rank(ValueError):
            refuse(False)
        x = torch.tensor([float(r)], requires_grad=True)
        everyone = all_gather_with_grad(x)
        (everyone.squeeze(1) * torch.tensor([1.0, 10.0, 100.0]) * (r + 1)).sum().backward()
        assert x.grad is not None
        assert x.grad.item() == 10**r * (1 + 2 + 3)
        x = torch.tensor([10.0 * r, 10.0 * r + 1, 10.0 * r + 2], requires_grad=True)
        parts = exchange_with_grad(x)
        assert parts.tolist() == [r, 10 + r, 20 + r]
        (parts * (r + 1)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [1, 2, 3], "a part's gradient comes from the rank that has it"


def test_collectives() -> None:
    run_distributed(collectives, 3)  # asserts in the processes; a failure there raises here
    assert gather_rows(torch.ones(2, 3)).shape == (2, 3)
    assert exchange_with_grad(torch.ones(1, 3)).shape == (1, 3)


def find(mistake: Exception | None) -> None:
    with reported_as_config_error():
        if mistake is not None:
            raise mistake


def mistakes() -> None:
    with distributed("cpu") as env:
        find(None)
        with pytest.raises(ConfigError, match=r"^rank 1: no such file$"):
            find(FileNotFoundError("no such file") if env.rank == 1 else None)
        with pytest.raises(ConfigError, match=r"^the same$"):
            find(ConfigError("the same"))


def test_mistake_of_one_rank_ends_all() -> None:
    run_distributed(mistakes, 2)
    with pytest.raises(ConfigError, match=r"^alone$"):
        find(ValueError("alone"))
