"""The registered operators as PyTorch sees them: schema, shapes and strides for torch.compile, dispatch."""

from __future__ import annotations

import pytest
import torch

from clipq import kernels
from tests.kernels.samples import check, samples


@pytest.mark.parametrize("name", samples("cpu"))
def test_operator(name) -> None:
    check("cpu", name)


def test_every_operator_has_samples() -> None:
    defined = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("clipq::")}
    assert {n.split(".")[0] for n in defined} == set(samples("cpu"))
    assert {n for n in kernels.__all__ if n != "implementation"} == set(samples("cpu"))


def test_implementation_on_the_cpu() -> None:
    assert kernels.implementation("cpu") == "reference"
    with pytest.raises(ValueError, match="expected one of"):
        kernels.implementation("cpu", torch.float16)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 0), torch.int8, "triton"),
        ((8, 9), torch.float8_e4m3fn, "triton"),
        ((9, 0), torch.int8, "triton (TMA)"),
        ((12, 0), torch.int8, "triton"),
        ((7, 5), torch.int8, "8.0 or newer"),
        ((8, 6), torch.float8_e5m2, "8.9 or newer"),
    ],
)
def test_implementation_on_a_gpu(capability, dtype, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    if "newer" not in expected:
        assert kernels.implementation("cuda", dtype) == expected
        return
    with pytest.raises(RuntimeError, match=expected):
        kernels.implementation("cuda", dtype)
