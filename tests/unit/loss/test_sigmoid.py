from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipq.loss.sigmoid import sigmoid_loss
from clipq.loss.tiles import TILE
from tests.unit.loss.memory import PeakMemory
from tests.unit.loss.naive import features, sigmoid_loss_of_images, value_and_gradients

TILES = [1, 7, 100, TILE]


def tiled(tile: int) -> Callable[..., Tensor]:
    return lambda *tensors: sigmoid_loss(*tensors, tile=tile)[0]


def naive(*tensors: Tensor) -> Tensor:
    return sigmoid_loss_of_images(*tensors).mean()


def inputs(pairs: int, scale: float = 10.0, bias: float = -10.0, width: int = 8) -> list[Tensor]:
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, bias)]
    return [*features(pairs, width), *scalars]


@pytest.mark.parametrize("scalars", [(0.0, 0.0), (10.0, -10.0), (100.0, -16.0), (60.0, 20.0)])
@pytest.mark.parametrize("pairs", [1, 2, 37])
@pytest.mark.parametrize("tile", TILES)
def test_value_and_gradients_are_the_naive_ones_and_openclips(
    tile: int, pairs: int, scalars: tuple[float, float]
) -> None:
    tensors = inputs(pairs, *scalars)
    ours, expected, theirs = (value_and_gradients(f, *tensors) for f in (tiled(tile), naive, SigLipLoss()))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tile", [6, TILE])
def test_gradcheck(tile: int) -> None:
    assert torch.autograd.gradcheck(tiled(tile), inputs(5, 3.0, -1.0, 4))


def test_arithmetic_is_fp32_under_autocast_too() -> None:
    tensors = [t.float() for t in inputs(40, width=32)]
    exact = value_and_gradients(naive, *(t.double() for t in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(tiled(300), *tensors)
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == torch.float32
        assert (x - y).abs().max() <= 2e-6 * y.abs().max()


@pytest.mark.parametrize("tile", TILES)
def test_largest_logit(tile: int) -> None:
    image, text, scale, bias = inputs(37)
    largest = sigmoid_loss(image, text, scale, bias, tile=tile)[1]
    assert not largest.requires_grad
    torch.testing.assert_close(largest, (scale * image @ text.T + bias).amax().detach())


def test_nan_is_in_the_loss() -> None:
    for which in range(4):
        tensors = [t.detach() for t in inputs(19)]
        tensors[which].view(-1)[-1] = math.nan
        assert not tiled(30)(*tensors).isfinite()


def test_extreme_logits_do_not_overflow() -> None:
    image = torch.eye(64)
    for text in (image, image.roll(1, 0)):
        found = value_and_gradients(tiled(500), image, text, torch.tensor(1000.0), torch.tensor(-500.0))
        assert all(x.isfinite().all() for x in found)


def test_second_derivatives_are_refused() -> None:
    """The gradient that comes in is a constant here: autograd would take the backward for one too."""
    tensors = inputs(6)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(tiled(20)(*tensors), tensors[0], create_graph=True)


def test_the_host_never_waits() -> None:
    with FakeTensorMode():
        tensors = [torch.randn(30, 8), torch.randn(30, 8), torch.tensor(3.0), torch.tensor(-3.0)]
        shapes = [x.shape for x in value_and_gradients(tiled(100), *tensors)]
        assert shapes == [(), (30, 8), (30, 8), (), ()]


def test_memory_is_linear_in_the_batch() -> None:
    peaks = []
    for pairs in (2048, 4096):
        tensors = [t.detach().float() for t in inputs(pairs, width=16)]
        with PeakMemory() as memory:
            value_and_gradients(tiled(2**14), *tensors)
        peaks.append(memory.peak)
    assert peaks[1] <= 2.05 * peaks[0] < 6 * 2**20
