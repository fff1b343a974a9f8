"""Registration of operators, and which implementation a device gets."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from clipq.kernels.formats import check_dtype


def register(name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], module: str) -> Any:
    """Defines `torch.ops.clipq.<name>`: `reference` on the CPU, the function of the same name in `module` on CUDA.

    Args:
        schema: arguments and results, as in "(Tensor x) -> Tensor".
        fake: shapes and dtypes of the results, for torch.compile.
        module: Triton module, imported on the first call with a CUDA tensor.

    Returns:
        The operator's overload, to be called.
    """
    torch.library.define(f"clipq::{name}", schema)

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    # Autocast would change the type of what an implementation computes inside, and autograd would take the gradient
    # of a rounding for one that means something.
    def on_cuda(*args: Any) -> Any:
        with torch._C._DisableAutocast(), torch.no_grad():
            return load()(*args)

    def on_cpu(*args: Any) -> Any:
        # results are laid out as the kernels lay them out, whatever the strides of the arguments
        dense = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
        with torch._C._DisableAutocast(), torch.no_grad():
            return reference(*dense)

    torch.library.impl(f"clipq::{name}", "cpu", on_cpu)
    torch.library.impl(f"clipq::{name}", "cuda", on_cuda)
    torch.library.impl(f"clipq::{name}", "Autograd", torch.library.fallthrough_kernel)  # results have no gradient
    torch.library.register_fake(f"clipq::{name}", fake)
    return getattr(torch.ops.clipq, name).default


def implementation(device: torch.device | str, dtype: torch.dtype = torch.int8) -> str:
    """What computes a product of `dtype` on `device`: "triton (TMA)", "triton", "reference", or that it is not known
    yet.

    Raises:
        RuntimeError: the device cannot compute with this type.
    """
    device = torch.device(device)
    check_dtype(dtype)
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{device}: low precision is implemented for CUDA, and for the CPU to test with")
    if device.type != "cuda":
        return "reference" if device.type == "cpu" else "not known yet (meta)"
    capability = torch.cuda.get_device_capability(device)
    needed = least_capability(dtype)
    if capability < needed:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) has no {dtype} "
            f"products: they need {needed[0]}.{needed[1]} or newer"
        )
    return "triton (TMA)" if has_tma(device) else "triton"


def least_capability(dtype: torch.dtype) -> tuple[int, int]:
    """Compute capability from which on NVIDIA's GPUs multiply this type, and Triton converts to it."""
    return (8, 0) if dtype is torch.int8 else (8, 9)


def has_tma(device: torch.device) -> bool:
    """Whether the GPU has Hopper's tensor memory accelerator."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
