"""StableAdamW's kernels compiled, and the optimizer on a GPU: large tensors, no waiting, CUDA graphs, loss scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipq.optim.stable_adamw import StableAdamW
from tests.kernels.optimizer_steps import *  # noqa: F403

pytestmark = pytest.mark.gpu
LARGE = [(), (1280,), (1280, 1280), (49408, 64), (3, 14, 14, 1280), (40_001,)]


def models(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters on the GPU and, in float64, on the CPU."""
    g = torch.Generator().manual_seed(0)
    # As small as weights are: of larger ones float32 loses more to rounding in 200 steps than the tests allow.
    start = [(0.02 * torch.randn(s, generator=g)).to(dtype) for s in LARGE]
    return [nn.Parameter(t.cuda()) for t in start], [nn.Parameter(t.double()) for t in start]


def give_gradients(params: list[nn.Parameter], other: list[nn.Parameter], step: int) -> None:
    g = torch.Generator(device="cuda").manual_seed(step)
    for p, q in zip(params, other, strict=True):
        grad = torch.randn(p.shape, generator=g, device="cuda").to(p.dtype) * (100 if step >= 100 else 1)
        p.grad, q.grad = grad, grad.cpu().double()


@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}], ids=str)
def test_two_hundred_steps_of_float64(path) -> None:
    params, exact = models()
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = StableAdamW(params, **settings, **path), StableAdamW(exact, **settings)
    for step in range(200):
        give_gradients(params, exact, step)
        ours.step()
        theirs.step()
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.rms[p].cpu().double(), theirs.rms[q].double(), rtol=1e-5, atol=1e-6)


def test_fused_is_the_default_and_never_waits() -> None:
    params, exact = models()
    optimizer = StableAdamW(params)
    give_gradients(params, exact, 0)
    optimizer.step()  # compiles
    give_gradients(params, exact, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile() as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    on_gpu = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e.name for e in on_gpu if not e.is_user_annotation and "Mem" not in e.name]
    assert sorted(kernels) == ["_ratio_sums", "_update"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(dtype) -> None:
    params, exact = models(dtype)
    optimizer, other = StableAdamW(params, lr=1e-2), StableAdamW(exact, lr=1e-2)
    give_gradients(params, exact, 0)
    optimizer.step()
    other.step()
    for p, q in zip(params, exact, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype is torch.float32
        torch.testing.assert_close(p.detach().cpu(), q.detach().to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_step_in_a_cuda_graph() -> None:
    """The rate is a tensor, gradients are overwritten in place: replays go on as steps one by one do."""
    params, _ = models()
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    rate = torch.tensor(1e-2, device="cuda")
    recorded, plain = StableAdamW(params, lr=rate, weight_decay=0.1), StableAdamW(alone, lr=1e-2, weight_decay=0.1)
    for p in params:
        p.grad = torch.zeros_like(p)

    def fill(step: int) -> None:
        g = torch.Generator(device="cuda").manual_seed(step)
        for p, q in zip(params, alone, strict=True):
            assert p.grad is not None
            q.grad = torch.randn(p.shape, generator=g, device="cuda")
            p.grad.copy_(q.grad)

    for step in range(2):
        fill(step)
        recorded.step()
        plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.step()
    for step in range(2, 6):
        if step == 3:  # another step, not recorded, with gradients elsewhere: what was recorded stays as it was
            aside = [p.grad for p in params]
            for p, q in zip(params, alone, strict=True):
                p.grad = q.grad = torch.ones_like(p)
            recorded.step()
            plain.step()
            for p, grad in zip(params, aside, strict=True):
                p.grad = grad
            torch.full((1 << 20,), -1, device="cuda")  # into memory that is free now
        if step == 4:
            rate.fill_(1e-3)
            plain.param_groups[0]["lr"] = 1e-3
        fill(step)
        graph.replay()
        plain.step()
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert recorded.state[params[0]]["step"].item() == 7


def test_dynamic_loss_scale() -> None:
    """GradScaler hands scale and overflow over; an overflow changes nothing, steps counted included."""
    params, exact = models()
    optimizer, other = StableAdamW(params, lr=1e-2), StableAdamW(exact, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step, overflow in enumerate((False, True, False)):
        give_gradients(params, exact, step)
        before = [p.detach().clone() for p in params]
        for p in params:
            assert p.grad is not None
            p.grad = p.grad * scaler.scale(torch.ones((), device="cuda"))
        if overflow:
            params[2].grad[5, 5] = math.inf  # pyright: ignore[reportOptionalSubscript]
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        else:
            other.step()
    assert optimizer.state[params[0]]["step"].item() == 2
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=1e-6, atol=1e-6)


def test_state_goes_between_devices_and_paths() -> None:
    params, exact = models()
    cpu: list[Tensor] = [nn.Parameter(q.detach().float()) for q in exact]
    first, second = StableAdamW(params, lr=1e-2), StableAdamW(cpu, lr=1e-2)
    give_gradients(params, exact, 0)
    first.step()
    second.load_state_dict(first.state_dict())
    for p, c in zip(params, cpu, strict=True):
        assert second.state[c]["step"].device.type == "cpu"
        assert torch.equal(second.state[c]["exp_avg"], first.state[p]["exp_avg"].cpu())
    first.load_state_dict(second.state_dict())
    give_gradients(params, exact, 1)
    first.step()
    assert first.state[params[1]]["step"].item() == 2
    assert first.state[params[1]]["step"].is_cuda


def test_rms_is_kept_by_who_read_it() -> None:
    params, exact = models()
    optimizer = StableAdamW(params)
    give_gradients(params, exact, 99)
    optimizer.step()
    first = optimizer.rms[params[1]]
    before = first.item()
    give_gradients(params, exact, 100)
    optimizer.step()
    assert first.item() == before
    assert optimizer.rms[params[1]] > 1.3


def test_path_is_that_of_where_the_parameters_are() -> None:
    model = nn.Linear(4, 4)
    optimizer = StableAdamW(model.parameters())
    model.cuda()
    model(torch.ones(1, 4, device="cuda")).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["step"].is_cuda, "fused"


def test_what_prevents_the_fused_path_is_named() -> None:
    params = [nn.Parameter(torch.ones(4, device="cuda")), nn.Parameter(torch.ones(4, device="cuda").double())]
    with pytest.warns(UserWarning, match="not fused, since a parameter is torch.float64"):
        StableAdamW(params)
