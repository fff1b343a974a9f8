"""The state of StableAdamW: from path to path, to and from torch's AdamW, through files, copies and hooks."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from clipq.optim.stable_adamw import StableAdamW
from tests.unit.optim.stepping import PATHS, assert_equal, parameters, run


@pytest.mark.parametrize("first", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("second", PATHS.values(), ids=PATHS)
def test_state_goes_from_path_to_path_and_through_a_file(first, second) -> None:
    params, whole = parameters(torch.float32), parameters(torch.float32)
    run(StableAdamW(whole, lr=1e-2, weight_decay=0.1, **first), whole, 130)
    optimizer = StableAdamW(params, lr=1e-2, weight_decay=0.1, **first)
    run(optimizer, params, 90)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = StableAdamW(params, **second)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(other, params, 40, first=91)
    assert_equal(params, whole, 1e-6 if first != second else 0)


def test_state_goes_to_and_from_adamw() -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    expected, params = parameters(), parameters()
    run(torch.optim.AdamW(expected, **settings), expected, 60)
    first, second, third = (
        torch.optim.AdamW(params, **settings),
        StableAdamW(params, clip_threshold=math.inf),
        torch.optim.AdamW(params, **settings),
    )
    run(first, params, 20)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["clip_threshold"] == math.inf, "AdamW has no such setting"
    assert second.param_groups[0]["betas"] == (0.9, 0.98)
    run(second, params, 20, first=21)
    third.load_state_dict(second.state_dict())
    run(third, params, 20, first=41)
    assert_equal(params, expected, 1e-10)


def test_copies_and_pickles() -> None:
    params = parameters(torch.float32)
    optimizer = StableAdamW(params, lr=1e-2)
    run(optimizer, params, 3)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = other.param_groups[0]["params"]
        run(other, own, 2, first=4)
        mine = [nn.Parameter(p.detach().clone()) for p in params]
        again = StableAdamW(mine, lr=1e-2)
        again.load_state_dict(optimizer.state_dict())
        run(again, mine, 2, first=4)
        assert_equal(own, mine, 0)


def test_hooks_of_loading_are_heard() -> None:
    """As those that find parameters by name: here the state comes in another order."""
    params = parameters(torch.float32, [(3,), (3,)])
    first, second = StableAdamW(params), StableAdamW(params)
    run(first, params, 2)

    def swap(_: object, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {0: state["state"][1], 1: state["state"][0]}}

    second.register_load_state_dict_pre_hook(swap)
    second.load_state_dict(first.state_dict())
    for i, p in enumerate(params):
        assert torch.equal(second.state[p]["exp_avg"], first.state[params[1 - i]]["exp_avg"])


@pytest.mark.parametrize("lacking", ["amsgrad", "maximize"])
def test_state_of_what_it_cannot_do_is_refused(lacking: str) -> None:
    params = parameters()
    other = torch.optim.AdamW(params, **{lacking: True})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"{lacking}=True"):
        StableAdamW(params).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "of another optimizer: it has no exp_avg, exp_avg_sq, step",
        ),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight decay is not decoupled"),
    ],
)
def test_state_of_another_optimizer_is_refused(make, says) -> None:
    p = nn.Parameter(torch.ones(3))
    other, own = make([p]), StableAdamW([p])
    p.grad = torch.ones(3)
    other.step()
    own.step()
    before = {name: value.clone() for name, value in own.state[p].items()}
    with pytest.raises(ValueError, match=says):
        own.load_state_dict(other.state_dict())
    assert all(torch.equal(own.state[p][name], value) for name, value in before.items())


def test_hooks_after_loading_have_the_last_word() -> None:
    params = parameters(torch.float32, [(3,)])
    first, second = StableAdamW(params), StableAdamW(params)
    run(first, params, 2)
    second.register_load_state_dict_post_hook(lambda o: o.state[params[0]]["exp_avg_sq"].fill_(7))
    second.load_state_dict(first.state_dict())
    assert second.state[params[0]]["exp_avg_sq"].tolist() == [7] * 3


def test_hooks_may_make_a_state_fit() -> None:
    params = parameters(torch.float32, [(3,)])
    first, second = StableAdamW(params), StableAdamW(params)
    run(first, params, 2)
    foreign = first.state_dict()
    foreign["state"] = {i: {"m" if k == "exp_avg" else k: v for k, v in s.items()} for i, s in foreign["state"].items()}

    def rename(_: object, state: dict[str, Any]) -> dict[str, Any]:
        renamed = {i: {"exp_avg" if k == "m" else k: v for k, v in s.items()} for i, s in state["state"].items()}
        return {**state, "state": renamed}

    second.register_load_state_dict_pre_hook(rename)
    second.load_state_dict(foreign)
    assert torch.equal(second.state[params[0]]["exp_avg"], first.state[params[0]]["exp_avg"])


@pytest.mark.parametrize(("saved", "own"), [((), (10, 10)), ((3, 4), (5, 3, 4)), ((3,), (4,)), ((2, 6), (3, 4))])
def test_state_of_other_shapes_changes_nothing(saved: tuple[int, ...], own: tuple[int, ...]) -> None:
    theirs, ours = parameters(torch.float32, [saved]), parameters(torch.float32, [own])
    first, second = StableAdamW(theirs, lr=1e-3), StableAdamW(ours, lr=1e-2)
    run(first, theirs, 1)
    run(second, ours, 1)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match="the state does not fit: exp_avg of shape"):
        second.load_state_dict(first.state_dict())
    after = second.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
