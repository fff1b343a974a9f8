"""StableAdamW over shapes, layouts, types and settings drawn at random."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipq.optim.stable_adamw import StableAdamW

shapes = st.lists(st.lists(st.integers(0, 5), max_size=5).map(tuple), min_size=1, max_size=4)
betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.999]))
present = st.lists(st.booleans(), min_size=4, max_size=4)


def largest_ratio(beta1: float, beta2: float, t: int) -> float:
    """The most that |m̂| / √û of step t can be, whatever the gradients were: by Cauchy and Schwarz over the two sums."""
    if beta2 == 0:  # the second moment has forgotten what the first still knows
        return 1.0 if t == 1 or beta1 == 0 else math.inf
    weights = math.sqrt(sum((beta1**2 / beta2) ** k for k in range(t)))
    return (1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2)) * weights


@settings(deadline=None, max_examples=60)
@given(
    shapes,
    betas,
    st.sampled_from([1e-8, 1e-6, 1e-3]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.3, 1.0, math.inf]),
    st.sampled_from([None, 0.8]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.lists(present, min_size=1, max_size=4),
    st.sampled_from([0.0, 1e-20, 1.0, 1e8]),
)
def test_paths_agree_and_a_step_is_bounded(shapes, betas, eps, decay, threshold, power, dtype, has, size) -> None:
    own = {"lr": 1e-2, "betas": betas, "eps": eps, "weight_decay": decay, "clip_threshold": threshold}
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    sides = []
    for foreach in (False, True):
        params = [nn.Parameter(t.clone().T if t.ndim == 2 else t.clone()) for t in start]
        sides.append((params, StableAdamW(params, **own, beta2_power=power, foreach=foreach)))
    for step, given_gradients in enumerate(has):
        before = [p.detach().clone() for p in sides[0][0]]
        for params, optimizer in sides:
            draw = torch.Generator().manual_seed(step)
            for p, there in zip(params, given_gradients, strict=False):
                grad = size * torch.randn(p.shape, generator=draw, dtype=torch.float64)
                p.grad = grad.to(dtype) if there else None
            optimizer.step()
        for i, (p, q) in enumerate(zip(sides[0][0], sides[1][0], strict=True)):
            limit = 1e-10 if dtype is torch.float64 else 1e-5 if dtype is torch.float32 else 2**-7
            # bf16: the last bit but one, less than a step
            torch.testing.assert_close(p, q, rtol=limit, atol=limit if dtype is not torch.bfloat16 else 1e-4)
            for name in ("exp_avg", "exp_avg_sq") if given_gradients[i] else ():
                of_both = (side[1].state[side[0][i]][name] for side in sides)
                torch.testing.assert_close(*of_both, rtol=1e-5, atol=1e-5 * size)
            assert p.isfinite().all()
            assert p.dtype is dtype
            if not given_gradients[i]:
                assert torch.equal(p, before[i])
            elif p.numel() and power is None:
                t = sum(earlier[i] for earlier in has[: step + 1])
                most = 1e-2 * (largest_ratio(*betas, t) + decay * before[i].abs().max())
                assert (p - before[i]).abs().max() <= most + limit * (1 + before[i].abs().max())
