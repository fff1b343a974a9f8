"""Two gloo processes against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipq.build import reported_as_config_error
from clipq.config.checks import ConfigError
from clipq.dist.env import distributed
from clipq.dist.gather import all_gather_with_grad, gather_objects, gather_rows, raised_on_every_rank
from clipq.loss.contrastive import contrastive_loss
from tests.helpers import run_distributed


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(12, 8, generator=g) for _ in range(2))
    return image, text, torch.tensor(2.0)


def plain_loss(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """The loss as the paper's pseudo-code has it, on the whole logits matrix."""
    logits = log_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients_of_rank(folder: str) -> None:
    with distributed("cpu") as env:
        tensors = [t.clone().requires_grad_() for t in whole_batch()]
        image, text, log_scale = tensors
        rows = slice(env.rank * 6, env.rank * 6 + 6)
        loss = contrastive_loss(F.normalize(image, dim=1)[rows], F.normalize(text, dim=1)[rows], log_scale.exp())
        loss.backward()
        torch.save([loss.detach(), *(t.grad for t in tensors)], f"{folder}/{env.rank}.pt")


def test_mean_over_ranks_is_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    run_distributed(gradients_of_rank, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    tensors = [t.clone().requires_grad_() for t in whole_batch()]
    loss = plain_loss(*tensors)
    loss.backward()
    for mean, expected in zip(
        [torch.stack(x).mean(0) for x in zip(*ranks, strict=True)],
        [loss.detach(), *(t.grad for t in tensors)],
        strict=True,
    ):
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)


def test_one_process_equals_the_plain_loss() -> None:
    image, text, log_scale = whole_batch()
    ours = contrastive_loss(F.normalize(image, dim=1), F.normalize(text, dim=1), log_scale.exp())
    torch.testing.assert_close(ours, plain_loss(image, text, log_scale))


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


def test_collectives() -> None:
    run_distributed(collectives, 3)  # asserts in the processes; a failure there raises here
    assert gather_rows(torch.ones(2, 3)).shape == (2, 3)


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
