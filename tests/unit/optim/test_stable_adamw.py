"""StableAdamW against the paper's algorithm, torch's AdamW and optimi's; groups and odd parameters."""

from __future__ import annotations

import math

import numpy as np
import optimi
import pytest
import torch
from torch import Tensor, nn

from clipq.kernels.stable_adamw import reference
from clipq.optim import stable_adamw
from clipq.optim.stable_adamw import StableAdamW
from tests.unit.optim.stepping import SHAPES, SHOCK, assert_equal, each_path, gradients, parameters, run


class Transcription:
    """Algorithm 2 of the paper as it is written there, in numpy, with debiased decays."""

    def __init__(self, lr: float, beta1: float, beta2: float, eps: float, decay: float) -> None:
        self.lr, self.beta1, self.beta2, self.eps, self.decay = lr, beta1, beta2, eps, decay

    def run(self, theta: np.ndarray, grads: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
        v, u = np.zeros_like(theta), np.zeros_like(theta)
        seen = []
        for t, g in enumerate(grads, start=1):
            hat1 = self.beta1 * (1 - self.beta1 ** (t - 1)) / (1 - self.beta1**t)
            hat2 = self.beta2 * (1 - self.beta2 ** (t - 1)) / (1 - self.beta2**t)
            v = hat1 * v + (1 - hat1) * g
            u = hat2 * u + (1 - hat2) * g**2
            rms = math.sqrt(np.mean(g**2 / np.maximum(u, self.eps**2))) if g.size else 0.0
            eta = self.lr / max(1.0, rms)
            theta = theta - eta * self.decay * theta - eta * v / (np.sqrt(u) + self.eps)
            seen.append(rms)
        return theta, seen


@each_path
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("beta2", [0.999, 0.95, 0.0])
def test_the_algorithm_of_the_paper(path, dtype, tolerance, beta2) -> None:
    steps = 200
    params = parameters(dtype)
    start = [p.detach().double().numpy().copy() for p in params]
    per_step = [gradients(s, params) for s in range(1, steps + 1)]
    seen = run(StableAdamW(params, lr=1e-3, betas=(0.9, beta2), eps=1e-6, weight_decay=0.1, **path), params, steps)
    for i, p in enumerate(params):
        grads = [g[i].double().numpy() for g in per_step]
        expected, rms = Transcription(1e-3, 0.9, beta2, 1e-6, 0.1).run(start[i], grads)
        np.testing.assert_allclose(p.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose([s[i] for s in seen], rms, rtol=max(1e-5, tolerance), atol=1e-6)
    clipped = [max(s) for s in seen]
    assert beta2 == 0 or max(clipped) > 3, "nothing was clipped: this would pass for plain AdamW too"


@each_path
def test_no_clipping_is_adamw(path) -> None:
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    run(StableAdamW(ours, clip_threshold=math.inf, **settings, **path), ours, 200)
    run(torch.optim.AdamW(theirs, foreach=False, **settings), theirs, 200)
    assert_equal(ours, theirs, 1e-10)


@each_path
def test_optimi(path) -> None:
    """optimi has no empty tensors and no ε² of its own choice: where both are defined they agree."""
    shapes = [s for s in SHAPES if s != (0,)]
    ours, theirs = parameters(torch.float32, shapes), parameters(torch.float32, shapes)
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    run(StableAdamW(ours, **settings, **path), ours, 200)
    run(optimi.StableAdamW(theirs, foreach=False, **settings), theirs, 200)
    assert_equal(ours, theirs, 2e-6)


@each_path
def test_schedule_of_beta2(path) -> None:
    params = parameters(shapes=[(7, 3)])
    theta = params[0].detach().numpy().copy()
    m, u = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, 31):
        g = gradients(t, params)[0].numpy()
        beta2 = 1 - t**-0.8
        m, u = 0.9 * m + 0.1 * g, beta2 * u + (1 - beta2) * g**2
        rms = math.sqrt(np.mean(g**2 / np.maximum(u, 1e-12)))
        theta = theta - 1e-2 / max(1.0, rms / 0.7) * (m / (1 - 0.9**t)) / (np.sqrt(u) + 1e-6)
    run(StableAdamW(params, lr=1e-2, betas=(0.9, 0.5), beta2_power=0.8, clip_threshold=0.7, **path), params, 30)
    np.testing.assert_allclose(params[0].detach().numpy(), theta, rtol=1e-10)


@each_path
def test_groups_have_their_own_settings(path) -> None:
    own = [
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-3},
        {"clip_threshold": math.inf},
        {"clip_threshold": 0.1, "beta2_power": 0.5},
    ]
    shapes = [(4, 3), (6,), (2, 2), ()]
    together = parameters(shapes=shapes)
    run(StableAdamW([{"params": [p], **o} for p, o in zip(together, own, strict=True)], **path), together, 20)
    for i, settings in enumerate(own):
        alone = parameters(shapes=shapes)
        optimizer = StableAdamW([alone[i]], **settings, **path)
        for step in range(1, 21):
            alone[i].grad = gradients(step, alone)[i]
            optimizer.step()
        assert torch.equal(alone[i], together[i])


@each_path
def test_missing_and_zero_gradients(path) -> None:
    params = parameters(torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = StableAdamW(params, lr=1e-2, weight_decay=0.0, **path)
    optimizer.step()
    assert not optimizer.state
    assert not optimizer.rms
    params[0].grad = torch.zeros(3, 4)
    params[2].grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(params[0], before[0]), "a gradient of zero at the first step moves nothing"
    assert optimizer.rms[params[0]] == 0
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, True, False, True, True, True]
    params[2].grad = None
    params[1].grad = torch.ones(())
    optimizer.step()
    # each parameter counts its own steps
    assert [optimizer.state[p]["step"].item() for p in params[:3]] == [2, 1, 1]
    assert set(optimizer.rms) == {params[0], params[1]}


@each_path
def test_gradients_are_not_changed(path) -> None:
    params = parameters(torch.float32)
    optimizer = StableAdamW(params, weight_decay=0.1, **path)
    for p, g in zip(params, gradients(SHOCK, params), strict=True):
        p.grad = g
    kept = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(p.grad, k) for p, k in zip(params, kept, strict=True) if p.grad is not None)


@each_path
def test_strides_do_not_matter(path) -> None:
    """Transposed, sliced and channels-last parameters, and gradients laid out in another way than they are."""
    base = [torch.randn(4, 6), torch.randn(8, 10), torch.randn(2, 3, 4, 4)]
    views = [base[0].t(), base[1][::2, 1:7], base[2].to(memory_format=torch.channels_last)]
    strided, plain = [nn.Parameter(v) for v in views], [nn.Parameter(v.contiguous().clone()) for v in views]
    first, second = StableAdamW(strided, lr=1e-2, **path), StableAdamW(plain, lr=1e-2, **path)
    for step in range(1, 6):
        for p, q, g in zip(strided, plain, gradients(step, plain), strict=True):
            p.grad, q.grad = g, g
        first.step()
        second.step()
    for p, q in zip(strided, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@each_path
def test_bf16_parameters_have_float32_moments(path) -> None:
    params, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    optimizer, other = StableAdamW(params, lr=1e-2, **path), StableAdamW(wide, lr=1e-2, **path)
    for step in range(1, 11):
        for p, q, g in zip(params, wide, gradients(step, params), strict=True):
            p.grad, q.grad = g, g.float()
        optimizer.step()
        other.step()
        for p, q in zip(params, wide, strict=True):
            assert torch.equal(p, q.bfloat16()), "one step is the float32 step, rounded"
            q.data.copy_(p)
    for p in params:
        assert p.dtype is torch.bfloat16
        assert optimizer.state[p]["exp_avg"].dtype is optimizer.state[p]["exp_avg_sq"].dtype is torch.float32
    loaded = StableAdamW(params, **path)
    loaded.load_state_dict(optimizer.state_dict())
    for p in params:
        for name in ("exp_avg", "exp_avg_sq"):
            assert loaded.state[p][name].dtype is torch.float32
            assert torch.equal(loaded.state[p][name], optimizer.state[p][name])


@each_path
def test_not_finite_gradients_are_not_hidden(path) -> None:
    params = parameters(torch.float32, [(4,), (4,)])
    optimizer = StableAdamW(params, **path)
    for p in params:
        p.grad = torch.ones(4)
    params[0].grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
    optimizer.step()
    assert optimizer.rms[params[0]].isnan()
    assert params[0].isnan().all(), "the rate of the whole tensor is lost"
    assert params[1].isfinite().all()


def test_closures_schedulers_and_scalers() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = StableAdamW([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    scheduler.step()
    before = p.item()
    optimizer.step(closure)
    assert abs(before - p.item()) == pytest.approx(0.05, rel=0.05)
    scaler = torch.amp.GradScaler("cpu")
    for size, moves in ((1.0, True), (math.inf, False)):
        before = p.item()
        optimizer.zero_grad()
        scaler.scale(p.sum() * size).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (p.item() != before) is moves


@each_path
def test_rate_as_a_tensor(path) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    rate = torch.tensor(1e-2)
    first, second = StableAdamW(ours, lr=rate, **path), StableAdamW(theirs, lr=1e-2, **path)
    run(first, ours, 3)
    run(second, theirs, 3)
    rate.fill_(1e-3)
    second.param_groups[0]["lr"] = 1e-3
    run(first, ours, 3, first=4)
    run(second, theirs, 3, first=4)
    assert_equal(ours, theirs, 1e-7)


def test_a_group_added_later() -> None:
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = StableAdamW(params[:1], lr=1e-2)
    run(optimizer, params[:1], 2)
    optimizer.add_param_group({"params": params[1:], "lr": 1e-3})
    run(optimizer, params, 2, first=3)
    assert optimizer.state[params[1]]["step"].item() == 2
    optimizer._path = "fused"  # as on a GPU
    with pytest.raises(ValueError, match="float32 on cpu"):
        optimizer.add_param_group({"params": parameters(torch.float32, [(2,)])})
    with pytest.raises(ValueError, match="eps=0"):
        optimizer.add_param_group({"params": parameters(torch.float32, [(2,)]), "eps": 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: expected"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (1.0, 0.9)}, "betas="),
        ({"betas": (0.9, -0.1)}, "betas="),
        ({"betas": 0.9}, r"betas=0\.9: expected two decays"),
        ({"betas": (0.9,)}, r"betas=\(0\.9,\): expected two decays"),
        ({"lr": torch.ones(2)}, r"lr of shape \(2,\): expected one rate"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": math.inf}, "weight_decay=inf"),
        ({"clip_threshold": 0.0}, "clip_threshold=0.0"),
        ({"beta2_power": 0.0}, "beta2_power=0.0"),
        ({"foreach": True, "fused": True}, "choose one"),
        ({"foreach": True, "capturable": True}, "capturable"),
        ({"fused": True}, "float32 on cpu"),
    ],
)
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        StableAdamW(parameters(torch.float32), **settings)


def test_a_refused_group_is_not_added() -> None:
    optimizer = StableAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "eps": 0.0})
    assert len(optimizer.param_groups) == 1
    for rate in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="lr="):
            StableAdamW([nn.Parameter(torch.ones(2))], lr=torch.tensor(rate))


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        StableAdamW(embedding.parameters()).step()


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="complex"):
        StableAdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_rms_is_kept_by_who_read_it() -> None:
    (p,) = params = parameters(torch.float32, [(50,)])
    optimizer = StableAdamW(params)
    run(optimizer, params, 1)
    first = optimizer.rms[p]
    before = first.item()
    p.grad = 100 * torch.ones(50)
    optimizer.step()
    assert first.item() == before
    assert optimizer.rms[p] > 1.3


@each_path
def test_a_rate_with_a_dimension_and_a_scalar(path) -> None:
    params = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))]
    optimizer = StableAdamW(params, lr=torch.tensor([1e-2]), **path)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[0].item() == pytest.approx(2 - 1e-2, rel=1e-4)
    assert params[0].shape == ()


def test_the_plain_loop_is_asked_for() -> None:
    params = [nn.Parameter(torch.ones(3))]
    assert (StableAdamW(params)._path, StableAdamW(params, foreach=False)._path) == ("foreach", "reference")


def test_moments_follow_the_layout_of_their_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels go through memory in its order, whatever the parameter's."""
    ours, theirs = parameters(torch.float32, [(4, 3, 3, 3)]), parameters(torch.float32, [(4, 3, 3, 3)])
    first, second = StableAdamW(ours, lr=1e-2), StableAdamW(theirs, lr=1e-2)
    run(first, ours, 2)
    run(second, theirs, 2)
    ours[0].data = ours[0].data.to(memory_format=torch.channels_last)
    monkeypatch.setattr(stable_adamw, "_implementation", lambda _: reference)
    first._path = "fused"
    run(first, ours, 2, first=3)
    state = first.state[ours[0]]
    assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == ours[0].stride() != theirs[0].stride()
    run(second, theirs, 2, first=3)
    assert_equal(ours, theirs, 1e-7)
