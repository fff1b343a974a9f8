"""Compiles what the launch code launches, for GPUs that are not here.

The launch code runs on `meta` tensors with `launch` replaced: tiles, warps, constants and types are those of a real
launch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature

from clipq.kernels import rowwise

MODULES = {
    name: importlib.import_module(f"clipq.kernels.{name}.triton")
    for name in ("gelu", "layer_norm", "matmul", "quantize", "stable_adamw")
}

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227}
"""Shared memory of a multiprocessor that one program can have."""


@dataclass
class Launch:
    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    """Constants, warps and stages."""


def record(call: Callable[[], object]) -> list[Launch]:
    """The kernels that a call would launch."""
    with _recording() as launches:
        call()
    return launches


@contextmanager
def _recording() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def launch(
        kernel: JITFunction,
        grid: tuple[int, ...],
        *args: Any,
        constants: dict[str, Any],
        warps: int = 4,
        stages: int = 3,
    ) -> None:
        assert [*constants] == kernel.arg_names[len(args) :], f"{kernel}: constants in another order than its signature"
        launches.append(Launch(kernel, grid, args, {**constants, "num_warps": warps, "num_stages": stages}))

    places = [module for module in (rowwise, *MODULES.values()) if hasattr(module, "launch")]
    with pytest.MonkeyPatch.context() as patch:
        for module in places:
            patch.setattr(module, "launch", launch)
        yield launches


def compile_for(launch: Launch, capability: int) -> Any:
    """As `JITFunction.run` does on a GPU of that compute capability, without loading the result."""
    target = GPUTarget("cuda", capability, 32)
    backend = triton.compiler.make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    kwargs = dict(launch.options, debug=False)
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constants, attrs = launch.kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attrs)
    return triton.compiler.compile(source, target=target, options=options.__dict__)


def spilled_bytes(compiled: Any, folder: Path) -> int:
    """Bytes of the stack of one thread: registers that did not fit."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def launched_kernels() -> set[str]:
    """Names of the kernels of all modules that no other kernel calls: those that Python must launch."""
    kernels, called = set(), set()
    for module in (rowwise, *MODULES.values()):
        for function in ast.parse(inspect.getsource(module)).body:
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                kernels.add(function.name)
                called |= {
                    n.func.id for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
                }
    return kernels - called


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
