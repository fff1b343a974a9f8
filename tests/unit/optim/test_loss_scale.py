"""The fixed loss scale: what is left out of a step, and what is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipq.optim import FixedLossScaler, StableAdamW


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(net: nn.Module, scaler: FixedLossScaler | None) -> None:
    loss = net(torch.randn(5, 3, generator=torch.Generator().manual_seed(1))).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("make", [torch.optim.AdamW, StableAdamW, lambda p: torch.optim.SGD(p, lr=0.1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [False, True])
def test_only_the_bad_tensor_is_left_out(make, bad, clip) -> None:
    ours, theirs = model(), model()
    first, second = make(ours.parameters()), make(theirs.parameters())
    scaler = FixedLossScaler(ours.named_parameters(), 1024.0)
    for step in range(4):
        for net, scale in ((ours, scaler), (theirs, None)):
            net.zero_grad()
            backward(net, scale)
        if step == 2:
            ours[0].weight.grad[1, 2] = bad
            theirs[0].weight.grad = None
        before = [p.detach().clone() for p in ours.parameters()]
        if clip:
            scaler.unscale_(first)
            a, b = (nn.utils.clip_grad_norm_(net.parameters(), 0.1) for net in (ours, theirs))
            assert torch.equal(a, b), "the norm is that of what is left"
        scaler.step(first)
        second.step()
        moved = [not torch.equal(p, b) for p, b in zip(ours.parameters(), before, strict=True)]
        assert moved == [step != 2, True, True, True]
        assert scaler.left_out == (["0.weight"] if step == 2 else [])
        scaler.update()
        assert all(p.grad is not None for p in ours.parameters()), "what was put aside is back"
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    assert scaler.skipped == {"0.weight": 1}
    other = FixedLossScaler(ours.named_parameters())
    other.load_state_dict(scaler.state_dict())
    assert other.skipped == {"0.weight": 1}
    assert other.get_scale() == 65536
    other.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    assert not other.skipped


def test_missing_and_empty_gradients() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD(params, lr=1.0)
    scaler = FixedLossScaler([], 2.0)
    scaler.step(optimizer)  # nothing has a gradient
    scaler.update()
    params[1].grad, params[2].grad = torch.ones(0), torch.tensor([2.0, math.nan, 2.0])
    scaler.step(optimizer)
    assert torch.equal(params[2], torch.ones(3))
    assert scaler.left_out == ["parameter 0, which has no name"]
    with pytest.raises(RuntimeError, match="called already"):
        scaler.unscale_(optimizer)
    scaler.update()
    assert params[2].grad.isnan().any()
    assert params[2].grad[0] == 2, "as it was, not unscaled"


def test_two_optimizers_are_unscaled_alike() -> None:
    net = model()
    first, second = (torch.optim.SGD([net[i].weight], lr=1.0) for i in (0, 2))
    scaler = FixedLossScaler(net.named_parameters(), 1024.0)
    for step in range(3):
        net.zero_grad()
        for i in (0, 2):
            net[i].weight.grad = torch.full_like(net[i].weight, 1024.0)
        if step == 1:
            net[2].weight.grad[0, 0] = math.inf
        before = [net[i].weight.detach().clone() for i in (0, 2)]
        for optimizer in (first, second):
            scaler.step(optimizer)
            with pytest.raises(RuntimeError, match="was called already"):
                scaler.step(optimizer)
        assert torch.equal(net[0].weight, before[0] - 1)
        assert torch.equal(net[2].weight, before[1] - float(step != 1))
        assert scaler.left_out == (["2.weight"] if step == 1 else [])
        scaler.update()
    assert scaler.skipped == {"2.weight": 1}


def test_steps_in_a_row_are_counted() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), FixedLossScaler([("p", p)])
    found = []
    for value in (math.nan, math.inf, 1.0, math.nan):
        p.grad = torch.full((2,), value)
        scaler.step(optimizer)
        scaler.update()
        found.append(scaler.in_a_row.get("p", 0))
    assert found == [1, 2, 0, 1]


def test_gradients_in_float16_are_refused() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    p.grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match="keep float32 weights"):
        FixedLossScaler([("p", p)]).unscale_(torch.optim.SGD([p]))
    with pytest.raises(TypeError, match="named_parameters"):
        FixedLossScaler([p])  # pyright: ignore[reportArgumentType]


def test_wrong_scales() -> None:
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale="):
            FixedLossScaler([], scale)


def test_gradients_may_be_dropped_before_update() -> None:
    """As with torch's scaler: what was put aside does not come back after `zero_grad`."""
    net = model()
    optimizer = StableAdamW(net.parameters())
    scaler = FixedLossScaler(net.named_parameters(), 2.0)
    for step in range(2):
        backward(net, scaler)
        if step == 0:
            net[0].weight.grad[0, 0] = math.nan
        scaler.step(optimizer)
        assert scaler.left_out == (["0.weight"] if step == 0 else [])
        optimizer.zero_grad()
        scaler.update()
        assert net[0].weight.grad is None


def test_a_loss_in_float16() -> None:
    """Its gradient is the scale, and 65536 is more than float16 holds: nothing would ever be trained."""
    net = torch.nn.Linear(4, 4)
    loss = (net(torch.ones(2, 4)) - 1).abs().mean().half()
    with pytest.raises(ValueError, match=r"a loss in float16, .*: compute the loss in float32"):
        FixedLossScaler(net.named_parameters()).scale(loss)
    scaler = FixedLossScaler(net.named_parameters(), 32768.0)
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(net.parameters(), lr=0.1))
    assert scaler.left_out == []


def test_what_has_no_name_is_counted_one_by_one() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer, scaler = torch.optim.SGD(params, lr=1.0), FixedLossScaler([])
    for step in range(4):
        for n, p in enumerate(params):
            p.grad = torch.full((2,), math.nan if n == step % 2 else 1.0)
        scaler.step(optimizer)
        assert list(scaler.in_a_row.values()) == [1]
        scaler.update()


def test_a_step_whose_loss_was_bad_does_not_count() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), FixedLossScaler([("p", p)])
    for forgiven in (False, True, False):
        p.grad = torch.full((2,), math.nan)
        scaler.unscale_(optimizer)
        if forgiven:
            scaler.forgive()
            assert scaler.left_out == []
        scaler.update()
    assert scaler.skipped == {"p": 2}
    assert scaler.in_a_row == {"p": 2}
