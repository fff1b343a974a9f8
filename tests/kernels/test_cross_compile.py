"""Every Triton kernel is built, without a GPU, for the GPUs that it is meant for, as the launch code launches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clipq.kernels.stable_adamw import Hyper, Tensors
from tests.kernels import cross_compile
from tests.kernels.cross_compile import MODULES, SHARED_KB, compile_for, empty, record, spilled_bytes

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = 33024
quantize, layer_norm, gelu, matmul, stable_adamw = (
    MODULES[m] for m in ("quantize", "layer_norm", "gelu", "matmul", "stable_adamw")
)


def vector(n: int) -> torch.Tensor:
    return empty(n, dtype=FP32)


def scalar(dtype: torch.dtype = FP32) -> torch.Tensor:
    return empty(dtype=dtype)


ROW_KERNELS: dict[str, Callable[[int, torch.dtype, torch.dtype], Any]] = {
    "quantize_rows": lambda n, x, q: quantize.quantize_rows(empty(ROWS, n, dtype=x), q, False),
    "quantize_rows, sums": lambda n, x, q: quantize.quantize_rows(empty(ROWS, n, dtype=x), q, True),
    "pack_quantize_rows": lambda n, x, q: quantize.pack_quantize_rows(*(empty(ROWS, n, dtype=x) for _ in "qkv"), q),
    "quantize_tensor": lambda n, x, q: quantize.quantize_tensor(empty(n, n, dtype=x), q),
    "quantize_columns": lambda n, x, q: quantize.quantize_columns(empty(ROWS, n, dtype=x), q, None),
    "dequantize_rows": lambda n, x, q: quantize.dequantize_rows(empty(ROWS, n, dtype=q), vector(ROWS), x),
    "layer_norm": lambda n, x, q: layer_norm.layer_norm_quantize(
        empty(ROWS, n, dtype=x), vector(n), vector(n), 1e-5, BF16 if x is FP32 else x, q, True
    ),
    "layer_norm, backward": lambda n, x, q: layer_norm.layer_norm_backward(
        *(empty(ROWS, n), empty(ROWS, n, dtype=x), vector(n), vector(ROWS), vector(ROWS), empty(ROWS, n, dtype=x)),
        vector(n),
    ),
    "gelu": lambda n, x, q: gelu.gelu_quantize(empty(ROWS, n, dtype=x), False, q, True),
    "quick gelu": lambda n, x, q: gelu.gelu_quantize(empty(ROWS, n, dtype=x), True, q, False),
    "gelu, backward": lambda n, x, q: gelu.gelu_backward_quantize(
        empty(ROWS, n, dtype=x), empty(ROWS, n, dtype=x), False, q, True
    ),
    "quick gelu, backward": lambda n, x, q: gelu.gelu_backward_quantize(
        empty(ROWS, n, dtype=x), empty(ROWS, n, dtype=x), True, q, False
    ),
}
STOCHASTIC = {
    "stochastic": lambda n, x, q: quantize.quantize_columns(empty(ROWS, n, dtype=x), INT8, scalar(torch.int64)),
}


def product(inner: int, dtype: torch.dtype, *, per_column: bool, bias: bool, residual: bool, out: torch.dtype) -> None:
    a, b = (empty(rows, inner, dtype=dtype) for rows in (ROWS, 3840))
    matmul.matmul(
        *(a, b if dtype is not E5M2 else empty(3840, inner, dtype=E4M3), vector(ROWS)),
        *(vector(3840) if per_column else scalar(), vector(3840) if bias else None),
        *(empty(ROWS, 3840, dtype=out) if residual else None, out),
    )


PRODUCTS = [
    {"inner": inner, "per_column": per_column, "bias": bias, "residual": residual, "out": out}
    for inner in (1280, 5120)
    for per_column, bias, residual, out in (
        (False, True, False, BF16),
        (True, True, False, BF16),
        (False, False, False, BF16),
        (False, True, True, BF16),
        (False, True, True, FP32),
        (True, False, False, FP32),
    )
]
QUICK_PRODUCTS = [PRODUCTS[0], PRODUCTS[4]]


def optimizer_step(*, p: torch.dtype, g: torch.dtype, sharded: bool) -> None:
    """StableAdamW of a few tensors; where they lie is 0 on `meta`, which is aligned."""
    shapes = [(5,), (300, 257)]
    own = lambda dtype: [empty(*s, dtype=dtype) for s in shapes]  # noqa: E731
    tensors = Tensors(
        *(own(p), own(g), own(FP32), own(FP32), [scalar() for _ in shapes], [1, 1], [0, 0]),
        hypers=[Hyper(1e-3, 0.9, 0.99, None, 1e-6, 0.1, 1.0)],
        grad_scale=scalar() if sharded else None,
        found_inf=scalar() if sharded else None,
    )
    stable_adamw.step(tensors, (lambda sums: sums) if sharded else None)


def fp8(capability: int) -> tuple[torch.dtype, ...]:
    return (E4M3, E5M2) if capability >= 89 else ()


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for the session, none left over from another version of a kernel."""
    folder = tmp_path_factory.getbasetemp() / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))


@pytest.fixture(params=SHARED_KB, ids=lambda c: f"sm_{c}")
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(matmul, "_has_tma", lambda device: request.param == 90)
    return request.param


def built(call: Callable[[], Any], capability: int, folder: Path) -> list[Any]:
    """What a call would launch, compiled: each kernel fits and keeps its values in registers."""
    launches = record(call)
    assert launches, "nothing was launched"
    kernels = []
    for launch in launches:
        kernel = compile_for(launch, capability)
        what = f"{launch.kernel.__name__} on sm_{capability}"
        assert kernel.metadata.num_warps == launch.options["num_warps"]
        assert kernel.metadata.shared <= SHARED_KB[capability] * 1024, what
        spilled = spilled_bytes(kernel, folder)
        # what was measured is Hopper's: elsewhere a little may go to the stack, as long as it is not in the inner loop
        assert spilled <= (64 if capability == 90 else 256), f"{what} spills {spilled} bytes a thread"
        kernels.append(kernel)
    return kernels


def build_rows(
    widths: tuple[int, ...],
    inputs: tuple[torch.dtype, ...],
    types: tuple[torch.dtype, ...],
    capability: int,
    folder: Path,
) -> None:
    for width in widths:
        for x in inputs:
            for q in types:
                for call in (*ROW_KERNELS.values(), *(STOCHASTIC.values() if q is INT8 else ())):
                    built(lambda call=call, x=x, q=q, n=width: call(n, x, q), capability, folder)


def build_products(capability: int, cases: list[dict[str, Any]], folder: Path) -> None:
    for dtype in (INT8, *fp8(capability)):
        for case in cases:
            (kernel,) = built(lambda dtype=dtype, case=case: product(dtype=dtype, **case), capability, folder)
            ptx = kernel.asm["ptx"]
            if capability < 90:
                assert "mma.sync" in ptx, f"no tensor cores: {dtype} {case}"
                continue
            accumulator, operand = ("s32", "s8") if dtype is INT8 else ("f32", "e5m2" if dtype is E5M2 else "e4m3")
            assert "wgmma.mma_async.sync" in ptx
            assert f"{accumulator}.{operand}." in ptx, f"{dtype} is not multiplied as it is: {case}"
            assert "mma.sync.aligned.m16" not in ptx
            assert "cp.async.bulk.tensor.2d.shared" in ptx, f"operands are not loaded with TMA: {case}"
            assert "cp.async.bulk.tensor.2d.global" in ptx, f"the output is not stored with TMA: {case}"
            tile = matmul.hopper_tile(
                case["inner"], int8=dtype is INT8, residual=case["residual"], out_bytes=case["out"].itemsize
            )
            # a multiprocessor has 228 KB, of which each program takes 1 KB for the system
            assert kernel.metadata.shared <= (228 // tile.programs - 1) * 1024, f"{tile.programs} do not fit: {case}"


def test_row_kernels_build(capability: int, tmp_path: Path) -> None:
    build_rows((1280,), (BF16,), (INT8, *fp8(capability)[:1]), capability, tmp_path)


def test_products_build(capability: int, tmp_path: Path) -> None:
    build_products(capability, QUICK_PRODUCTS, tmp_path)


@pytest.mark.slow
def test_row_kernels_build_at_every_width_and_type(capability: int, tmp_path: Path) -> None:
    types = (INT8, *fp8(capability))
    build_rows((768, 1024, 1536, 4096, 5120), (BF16,), types, capability, tmp_path)
    build_rows((1280,), (FP16, FP32), types, capability, tmp_path)


@pytest.mark.slow
def test_products_build_at_every_width_and_epilogue(capability: int, tmp_path: Path) -> None:
    build_products(capability, PRODUCTS, tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("p", "g"), [(FP32, FP32), (BF16, BF16), (FP16, FP32)])
def test_optimizer_builds(p, g, sharded, capability: int, tmp_path: Path) -> None:
    for kernel in built(lambda: optimizer_step(p=p, g=g, sharded=sharded), capability, tmp_path):
        wide = [line for line in kernel.asm["ptx"].splitlines() if ".v4." in line and "global" in line]
        assert kernel.metadata.name == "_add_chunks" or wide, "16 bytes at a time"


def test_products_of_unaligned_matrices_build(capability: int, tmp_path: Path) -> None:
    call = lambda: matmul.matmul(  # noqa: E731
        *(empty(257, 1283, dtype=INT8), empty(31, 1283, dtype=INT8), vector(257), scalar(), None, None, BF16)
    )
    assert record(call)[0].kernel is matmul._matmul_pointers
    built(call, capability, tmp_path)


def test_no_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel added without a case above would be compiled by nobody."""
    launched = set()
    for tma in (True, False):
        monkeypatch.setattr(matmul, "_has_tma", lambda device, tma=tma: tma)
        launched |= {launch.kernel.__name__ for launch in record(lambda: product(dtype=INT8, **PRODUCTS[0]))}
    launched |= {k.kernel.__name__ for k in record(lambda: optimizer_step(p=FP32, g=FP32, sharded=True))}
    for call in (*ROW_KERNELS.values(), *STOCHASTIC.values()):
        launched |= {launch.kernel.__name__ for launch in record(lambda call=call: call(1280, BF16, INT8))}
    assert launched == cross_compile.launched_kernels()
    folders = {path.parent.name for path in Path(quantize.__file__).parents[1].glob("*/triton.py")}
    assert folders == set(MODULES)
