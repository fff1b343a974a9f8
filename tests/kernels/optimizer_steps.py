"""StableAdamW's Triton kernels against plain torch. Not collected by name: runs as `against_reference.py` does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clipq.kernels.stable_adamw import Hyper, Tensors, reference
from clipq.kernels.stable_adamw import triton as kernels
from tests.kernels.against_reference import DEVICE, INTERPRETED

SIZES = [(), (0,), (5,), (3, 4), (64,), (256,), (257,), (300, 5), (2049,)]
HYPERS = [
    Hyper(1e-2, 0.9, 0.999, None, 1e-6, 0.1, 1.0),
    Hyper(2e-2, 0.8, 0.95, 0.8, 1e-8, 0.0, 0.5),
    Hyper(1e-3, 0.0, 0.0, None, 1e-6, 0.2, math.inf),
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many chunks without large tensors."""
    monkeypatch.setattr(kernels, "CHUNK", 256)
    monkeypatch.setattr(kernels, "BLOCK", 64)


def made(types: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2, sizes: Any = SIZES, device=DEVICE) -> Tensors:
    """Tensors in the middle of training, the steps of each another number."""
    g = torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(s, generator=g).to(device, dtype) for s in sizes]

    return Tensors(
        params=draw(types[0]),
        grads=draw(types[1]),
        exp_avgs=draw(),
        exp_avg_sqs=[0.5 * t.square() for t in draw()],
        steps=[torch.tensor(float(i % 4), device=device) for i in range(len(sizes))],
        numels=[math.prod(s) for s in sizes],
        groups=[i % len(HYPERS) for i in range(len(sizes))],
        hypers=HYPERS,
    )


def new_gradients(tensors: Tensors, step: int) -> None:
    """At other places than before, as after `zero_grad(set_to_none=True)`."""
    g = torch.Generator().manual_seed(step)
    size = 30.0 if step > 5 else 1.0
    tensors.grads = [(size * torch.randn(t.shape, generator=g)).to(t.device, t.dtype) for t in tensors.grads]


def assert_same(ours: Tensors, theirs: Tensors, tolerance: float = 1e-6) -> None:
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert a.dtype is b.dtype
            # of 16-bit parameters a rounding may fall the other way
            limit = max(tolerance, 2 * torch.finfo(a.dtype).eps if a.element_size() == 2 else 0)
            torch.testing.assert_close(
                a.cpu().float(), b.float(), rtol=limit, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
            )


TYPES = [(torch.float32, torch.float32), (torch.float16, torch.float32)]
if not INTERPRETED:  # the interpreter cuts bfloat16 off
    TYPES += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_many_steps(types) -> None:
    ours, theirs = made(types), made(types, device="cpu")
    clipped = 0.0
    for step in range(10):
        new_gradients(ours, step)
        new_gradients(theirs, step)
        rms, expected = kernels.step(ours, None), reference.step(theirs, None)
        torch.testing.assert_close(rms.cpu(), expected, rtol=1e-5, atol=1e-6)
        assert_same(ours, theirs, 3e-6)
        clipped = max(clipped, expected.max().item())
    assert clipped > 2


def test_early_steps_are_debiased_exactly() -> None:
    """1 - 0.999^t in float32 is off by 1e-5 unless one takes care."""
    for t in (0, 1, 5, 600, 5000):
        ours, theirs = made(sizes=[(50,)]), made(sizes=[(50,)], device="cpu")
        ours.exp_avg_sqs[0].zero_()
        theirs.exp_avg_sqs[0].zero_()
        ours.steps[0].fill_(t)
        theirs.steps[0].fill_(t)
        torch.testing.assert_close(kernels.step(ours, None).cpu(), reference.step(theirs, None), rtol=2e-6, atol=0)


def test_tensors_that_begin_anywhere() -> None:
    """Views into one buffer, as DDP's buckets hand out gradients; 16 bytes at a time would be out of line."""
    ours, theirs = made(), made(device="cpu")
    for name in ("params", "grads"):
        moved = []
        for t in getattr(ours, name):
            buffer = torch.zeros(t.numel() + 1, device=DEVICE)
            moved.append(buffer[1:].view(t.shape).copy_(t))
        setattr(ours, name, moved)
    kernels.step(ours, None)
    reference.step(theirs, None)
    assert_same(ours, theirs)


def test_gradients_laid_out_in_another_way() -> None:
    ours, theirs = made(sizes=[(30, 40), (2, 3, 4, 5)]), made(sizes=[(30, 40), (2, 3, 4, 5)], device="cpu")
    ours.grads = [ours.grads[0].t().contiguous().t(), ours.grads[1].to(memory_format=torch.channels_last)]
    kernels.step(ours, None)
    reference.step(theirs, None)
    assert_same(ours, theirs)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_scaled_gradients(found_inf) -> None:
    ours, theirs, before = made(), made(device="cpu"), made(device="cpu")
    for tensors, device in ((ours, DEVICE), (theirs, "cpu")):
        tensors.grads = [1024 * g for g in tensors.grads]
        tensors.grad_scale = torch.tensor(1024.0, device=device)
    ours.found_inf = torch.tensor(found_inf, device=DEVICE)
    kernels.step(ours, None)
    reference.step(theirs, None)
    assert_same(ours, before if found_inf else theirs, 0 if found_inf else 1e-6)


def test_sums_of_shards_are_added_in_between() -> None:
    ours, theirs = made(), made(device="cpu")
    for tensors in (ours, theirs):
        tensors.numels = [3 * n for n in tensors.numels]
    rms, expected = kernels.step(ours, lambda s: 4 * s), reference.step(theirs, lambda s: 4 * s)
    torch.testing.assert_close(rms.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert_same(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_stays_in_its_tensor(bad) -> None:
    ours, clean = made(), made()
    ours.grads[7][200, 1] = bad
    rms, expected = kernels.step(ours, None), kernels.step(clean, None)
    for i, (p, q) in enumerate(zip(ours.params, clean.params, strict=True)):
        assert torch.equal(p, q) is (i != 7)
    assert not rms[7].isfinite()
    assert torch.equal(torch.cat((rms[:7], rms[8:])), torch.cat((expected[:7], expected[8:])))
    assert not ours.params[7].isfinite().all()


def test_settings_may_change_between_steps() -> None:
    ours, theirs = made(), made(device="cpu")
    for lr in (1e-2, 1e-3, 0.0):
        for tensors in (ours, theirs):
            tensors.hypers = [Hyper(lr, 0.9, 0.99, None, 1e-6, 0.1, 1.0)] * 3
        kernels.step(ours, None)
        reference.step(theirs, None)
        assert_same(ours, theirs, 3e-6)
    rate = torch.tensor(5e-3, device=DEVICE)
    for tensors, lr in ((ours, rate), (theirs, 5e-3)):
        tensors.hypers = [Hyper(lr, 0.9, 0.99, None, 1e-6, 0.1, 1.0)] * 3
        (kernels if tensors is ours else reference).step(tensors, None)
    assert_same(ours, theirs, 3e-6)


def test_same_inputs_same_bits() -> None:
    first, second = made(), made()
    for tensors in (first, second):
        for step in range(3):
            new_gradients(tensors, step)
            kernels.step(tensors, None)
    for a, b in zip(first.params, second.params, strict=True):
        assert torch.equal(a, b)
