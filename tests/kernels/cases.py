"""Awkward inputs, and the two implementations of the operators under one name."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
LOWP = (INT8, E4M3, E5M2)
SHAPES = [(1, 1), (17, 33), (6, 128), (0, 7), (3, 1)]
TALL = (1023, 129)
LAYOUTS = ("contiguous", "strided", "transposed")


def implementation(kind: str) -> SimpleNamespace:
    """The operators of every family: "triton" or "reference"."""
    found = {}
    for family in ("quantize", "matmul", "layer_norm", "gelu"):
        module = importlib.import_module(f"clipq.kernels.{family}.{kind}")
        found |= {
            n: f for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__
        }
    return SimpleNamespace(**found)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Rows of very different magnitudes, the fourth all zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * torch.tensor([1.0, 30.0, 0.01])[torch.arange(shape[0]) % 3].reshape(-1, *[1] * (len(shape) - 1))
    if len(shape) == 2:
        x[3:4] = 0
    return x.to(dtype).to(device)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.T.contiguous().T
    wide = torch.full((x.shape[0], x.shape[1] + 5), 1e4, dtype=x.dtype, device=x.device)
    wide[:, 3 : 3 + x.shape[1]] = x
    return wide[:, 3 : 3 + x.shape[1]]


def padded(x: Tensor) -> Tensor:
    """The same values with rows that start at multiples of 16 bytes, as TMA asks for; what lies between is not zero."""
    unit = 16 // x.element_size()
    wide = torch.ones(x.shape[0], (x.shape[1] + unit - 1) // unit * unit, device=x.device).to(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def integers(*shape: int, seed: int, device: str = "cpu") -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(INT8).to(device)
