from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipq.loss.contrastive import contrastive_loss
from clipq.loss.tiles import TILE, tiles
from tests.unit.loss.memory import PeakMemory
from tests.unit.loss.naive import clip_loss_of_pairs, features, value_and_gradients

TILES = [1, 7, 100, TILE]


def tiled(tile: int) -> Callable[..., Tensor]:
    return lambda image, text, scale: contrastive_loss(image, text, scale, tile=tile)[0]


def naive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return clip_loss_of_pairs(image, text, scale).mean()


@pytest.mark.parametrize("limit", [1, 2, 9, 10, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (7, 7), (7, 14), (13, 52)])
def test_tiles_cover_each_element_once(shape: tuple[int, int], limit: int) -> None:
    count = torch.zeros(shape, dtype=torch.int64)
    for rows, columns in tiles(*shape, limit):
        assert 0 < count[rows, columns].numel() <= limit
        count[rows, columns] += 1
    assert torch.equal(count, torch.ones_like(count))


def test_small_batches_are_one_tile() -> None:
    assert len(list(tiles(4096, 4096, TILE))) == 1
    assert len(list(tiles(512, 32768, TILE))) == 1
    assert len(list(tiles(4097, 4097, TILE))) == 4


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0, 100.0])
@pytest.mark.parametrize("pairs", [1, 2, 37])
@pytest.mark.parametrize("tile", TILES)
def test_value_and_gradients_are_the_naive_ones(tile: int, pairs: int, scale: float) -> None:
    tensors = [*features(pairs), torch.tensor(scale, dtype=torch.float64)]
    ours, expected = (value_and_gradients(f, *tensors) for f in (tiled(tile), naive))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile", [6, TILE])
def test_gradcheck(tile: int) -> None:
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tiled(tile), (*features(5, 4), scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_under_autocast_too(dtype: torch.dtype) -> None:
    """The backward as well, wherever it is called."""
    tensors = [*features(40, 32, dtype=dtype), torch.tensor(30.0)]
    exact = value_and_gradients(naive, *(t.double() for t in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(tiled(300), *tensors)
    assert ours[0].dtype == torch.float32
    for x, y, t in zip(ours, exact, [torch.zeros(()), *tensors], strict=True):
        assert x.dtype == t.dtype
        tolerance = 2e-6 if t.dtype is torch.float32 else torch.finfo(dtype).eps
        assert (x - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("tile", [500, TILE])
def test_a_small_loss_keeps_its_digits(tile: int) -> None:
    """Differences of log-sums of about 100 would be noise here, some of it below zero."""
    image = torch.eye(64)
    for scale in (14.0, 100.0):
        ours = value_and_gradients(tiled(tile), image, image, torch.tensor(scale))
        exact = value_and_gradients(naive, *(x.double() for x in (image, image, torch.tensor(scale))))
        assert exact[0] < 1e-4
        for x, y in zip(ours, exact, strict=True):
            assert (x - y).abs().max() <= 2e-6 * y.abs().max() + 2e-7  # of 1, beside which the others are added


@pytest.mark.parametrize("tile", [500, TILE])
def test_an_extreme_scale_does_not_overflow(tile: int) -> None:
    image = torch.eye(64)
    text = image.roll(1, 0)
    loss, *gradients = value_and_gradients(tiled(tile), image, text, torch.tensor(1000.0))
    assert loss.item() == pytest.approx(1000)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("tile", TILES)
def test_largest_logit(tile: int) -> None:
    image, text = features(37)
    scale = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    largest = contrastive_loss(image, text, scale, tile=tile)[1]
    assert not largest.requires_grad
    torch.testing.assert_close(largest, (scale * image @ text.T).amax().detach())


@pytest.mark.parametrize("tile", [30, TILE])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_feature_that_is_not_finite_is_in_the_loss(value: float, which: int, tile: int) -> None:
    """The guard learns of it by the loss."""
    tensors = [x.detach() for x in features(19, 8)]
    tensors[which][11, 3] = value
    assert not contrastive_loss(tensors[0], tensors[1], torch.tensor(10.0), tile=tile)[0].isfinite()


def test_a_frozen_tower() -> None:
    image, text = features(9)
    scale = torch.tensor(4.0, dtype=torch.float64)
    for a, b in ((image, text.detach()), (image.detach(), text)):
        leaf = a if a.requires_grad else b
        ours, expected = (torch.autograd.grad(f(a, b, scale), leaf)[0] for f in (tiled(30), naive))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_two_losses_in_one_step() -> None:
    """On the same features with two scales, and the graph kept for a second backward."""
    image, text = features(12)
    one, two = (torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (5.0, 9.0))
    leaves = (image, text, one, two)
    ours = tiled(50)(image, text, one) + 2 * tiled(70)(text, image, two)
    expected = torch.autograd.grad(naive(image, text, one) + 2 * naive(text, image, two), leaves)
    for keep in (True, False):
        found = torch.autograd.grad(ours, leaves, retain_graph=keep)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_second_derivatives_are_refused() -> None:
    image, text = features(6)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(tiled(20)(image, text, torch.tensor(3.0)), image, create_graph=True)


@pytest.mark.parametrize("tile", [1000, TILE])
def test_bits_are_the_same_again(tile: int) -> None:
    tensors = [*features(100, 16, dtype=torch.float32), torch.tensor(20.0)]
    first, again = (value_and_gradients(tiled(tile), *tensors) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_the_host_never_waits() -> None:
    """A value that the host would read cannot be had of a fake tensor: what a CUDA graph would refuse fails here."""
    with FakeTensorMode():
        tensors = [torch.randn(30, 8), torch.randn(30, 8), torch.tensor(3.0)]
        assert [x.shape for x in value_and_gradients(tiled(100), *tensors)] == [(), (30, 8), (30, 8), ()]


def peak(loss: Callable[..., Tensor], pairs: int) -> int:
    tensors = [*features(pairs, 16, dtype=torch.float32), torch.tensor(10.0)]
    with PeakMemory() as memory:
        value_and_gradients(loss, *tensors)
    return memory.peak


def test_memory_is_linear_in_the_batch() -> None:
    small, large = (peak(tiled(2**14), pairs) for pairs in (2048, 4096))
    assert small < 3 * 2**20
    assert large - small <= 1.05 * small, "more than twice the memory for twice the pairs"
    assert peak(naive, 4096) > 3.9 * peak(naive, 2048) > 2048**2, "what is measured does not see a whole matrix"
