"""Parameters, gradients and runs that the tests of StableAdamW share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipq.optim.stable_adamw import StableAdamW

SHAPES = [(3, 4), (), (5,), (0,), (2, 3, 4), (1, 2, 1, 3, 2)]
PATHS = {"reference": {"foreach": False}, "foreach": {"foreach": True}}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
SHOCK = 100
"""Step at which gradients grow a hundredfold, so that the update is clipped."""


def parameters(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    size = 100.0 if step >= SHOCK else 1.0
    return [(torch.randn(p.shape, generator=g, dtype=torch.float64) * size).to(p.dtype) for p in params]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, first: int = 1) -> list[list[float]]:
    """RMS of each tensor at each step, where the optimizer has it."""
    seen = []
    for step in range(first, first + steps):
        for p, grad in zip(params, gradients(step, params), strict=True):
            p.grad = grad
        optimizer.step()
        seen.append([optimizer.rms[p].item() for p in params] if isinstance(optimizer, StableAdamW) else [])
    return seen


def assert_equal(found: list[nn.Parameter], expected: list[Any], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        b = torch.as_tensor(b).detach()
        torch.testing.assert_close(a.detach().double(), b.double(), rtol=tolerance, atol=tolerance)
