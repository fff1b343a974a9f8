"""The look-up of compiled kernels: two calls share a binary only where Triton would let them."""

from __future__ import annotations

import pytest
import torch

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
