"""The look-up of compiled kernels: two calls share a binary only where Triton would let them."""

from __future__ import annotations

import pytest
import torch

from clipq.kernels import launch as launching
from clipq.kernels.launch import _specialization

triton = pytest.importorskip("triton")


def triton_key(arg: object) -> object:
    """What Triton itself specializes on."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl

    return native_specialize_impl(CUDABackend, arg, False, True, True)


ARGS = [
    *(0, 1, 2, 15, 16, 17, 32, 1280, 33024, 2**31 - 1, 2**31, 2**31 + 16),
    *(torch.zeros(64, dtype=d) for d in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)),
    *(torch.zeros(64, dtype=torch.float32)[n:] for n in (1, 2, 4)),
    *(torch.zeros(64, dtype=torch.int8)[n:] for n in (1, 8, 16)),
    *(0.5, 1e-5),
]


def test_what_triton_tells_apart_has_different_keys() -> None:
    for a in ARGS:
        for b in ARGS:
            if triton_key(a) != triton_key(b):
                assert _specialization(a) != _specialization(b), (a, b)


def test_calls_of_one_kind_share_a_key() -> None:
    assert _specialization(1280) == _specialization(5120)
    assert _specialization(17) == _specialization(33023)
    assert _specialization(torch.zeros(4)) == _specialization(torch.zeros(9, 3))
    assert _specialization(0.25) == _specialization(4.0)


def test_descriptors_differ_by_type_and_block() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.zeros(64, 64, dtype=torch.int8)
    keys = {_specialization(TensorDescriptor.from_tensor(x, block)) for block in ([16, 16], [32, 16], [16, 32])}
    keys.add(_specialization(TensorDescriptor.from_tensor(x.view(torch.float8_e4m3fn), [16, 16])))
    assert len(keys) == 4


def test_every_part_of_a_launch_is_in_its_key(monkeypatch) -> None:
    """Two launches that differ in one thing must not share a binary; equal ones must."""
    compiled = []

    class Kernel(triton.JITFunction):
        def __init__(self) -> None:
            self.arg_names = ["x", "n", "A", "B"]

        def __getitem__(self, grid):
            def run(*_, **__):
                compiled.append(grid)
                return {(1, 1, 1): lambda *_: None, (2, 1, 1): lambda *_: None}

            return run

        def __hash__(self) -> int:
            return id(self)

    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    first, x = Kernel(), torch.zeros(16)
    base = {"constants": {"A": 1, "B": 2}, "warps": 4, "stages": 3}
    launching.launch(first, (1,), x, 16, **base)
    launching.launch(first, (2,), x, 32, **base)  # the grid is no part of a binary
    assert len(compiled) == 1
    others = [
        (first, x, 17, base),
        (first, x.bfloat16(), 16, base),
        (first, x, 16, base | {"warps": 8}),
        (first, x, 16, base | {"stages": 4}),
        (first, x, 16, base | {"constants": {"A": 2, "B": 2}}),
        (first, x, 16, base | {"constants": {"A": 1, "B": True}}),
        (Kernel(), x, 16, base),
    ]
    for n, (kernel, t, size, settings) in enumerate(others, start=2):
        launching.launch(kernel, (1,), t, size, **settings)
        assert len(compiled) == n
