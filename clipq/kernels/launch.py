"""Launches Triton kernels with little work on the host.

`kernel[grid](…)` binds arguments by name, works out their specialization and looks the binary up: 20 to 30 µs in
Python. A training step of a ViT launches thousands of kernels, and many take no longer than that. Here the binary is
looked up by a key of our own, which holds what Triton specializes on: types, alignment of pointers, divisibility of
integers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, constants: dict[str, Any], warps: int = 4, stages: int = 3
) -> None:
    """Calls a kernel whose signature is `args`, then `constants`, in this order.

    Args:
        grid: one or two sizes; a kernel with a size of 0 is not launched.
        args: tensors, tensor descriptors, integers and floats.
        constants: the kernel's constexpr arguments.
    """
    if 0 in grid:
        return
    if not isinstance(kernel, triton.JITFunction):  # the interpreter
        kernel[grid](*args, **constants)
        return
    device = next(a for a in args if isinstance(a, Tensor)).device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, constants=constants, warps=warps, stages=stages)
        return
    key = (id(kernel), device, warps, stages, *constants.values(), *map(_specialization, args))
    compiled = _compiled.get(key)
    if compiled is None:
        assert [*constants] == kernel.arg_names[len(args) :], f"{kernel}: constants in another order than its signature"
        _compiled[key] = kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
    else:
        compiled[(*grid, 1, 1)](*args, *constants.values())


def _specialization(arg: Any) -> Any:
    """What Triton would compile another binary for."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    if isinstance(arg, float):
        return float
    return arg.base.dtype, *arg.block_shape  # a tensor descriptor
