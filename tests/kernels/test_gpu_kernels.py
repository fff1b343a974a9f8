"""The compiled kernels on a GPU: what the interpreter runs too, and what only real shapes and hardware show."""

from __future__ import annotations

import pytest
import torch

from clipq import kernels as operators
from clipq.kernels.matmul import triton as tiles
from tests.kernels.against_reference import *  # noqa: F403
from tests.kernels.cases import E4M3, E5M2, INT8, integers, random
from tests.kernels.emulation import assert_near, assert_quantized
from tests.kernels.non_finite import *  # noqa: F403
from tests.kernels.samples import check, samples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROWS = 33024


def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")


@pytest.mark.parametrize("name", samples("cpu"))
def test_operator_on_cuda(name) -> None:
    if name in ("quantize_rows", "quantize_tensor", "quantize_columns", "matmul"):
        needs_fp8()
    check("cuda", name)


@pytest.mark.parametrize(("N", "K"), [(3840, 1280), (1280, 5120), (768, 768)])
def test_real_int8_product_is_exact(N, K) -> None:
    """Every one of the sums, against products in float64, which are exact too."""
    a, b = integers(ROWS, K, seed=1, device="cuda") // 8, integers(N, K, seed=2, device="cuda") // 8
    exact = a.double() @ b.double().T
    assert exact.abs().max() < 2**24
    ones, one = torch.ones(ROWS, device="cuda"), torch.ones((), device="cuda")
    out = operators.matmul(a, b, ones, one, out_dtype=torch.float32)
    assert torch.equal(out.double(), exact)
    pointers = torch.empty_like(out)
    tiles.launch_pointers(tiles.POINTER_TILE, a, b, pointers, ones, one, None, None)
    assert torch.equal(pointers, out)


@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32])
def test_kernels_with_and_without_tma_agree(residual) -> None:
    """With scales and bias too: integer sums are exact and the epilogue is the same."""
    a, b = integers(1000, 1280, seed=1, device="cuda"), integers(520, 1280, seed=2, device="cuda")
    scale, w_scale = torch.rand(1000, device="cuda") * 1e-3, torch.rand((), device="cuda")
    bias = torch.randn(520, device="cuda")
    out_dtype = residual or torch.bfloat16
    around = None if residual is None else torch.randn(1000, 520, device="cuda").to(residual)
    out = operators.matmul(a, b, scale, w_scale, bias=bias, residual=around, out_dtype=out_dtype)
    pointers = torch.empty_like(out)
    tiles.launch_pointers(tiles.POINTER_TILE, a, b, pointers, scale, w_scale, bias, around)
    assert torch.equal(out, pointers)


@pytest.mark.parametrize(("left", "right"), [(E4M3, E4M3), (E5M2, E4M3)])
def test_real_fp8_product(left, right) -> None:
    needs_fp8()
    x, w = random(ROWS, 1280, device="cuda"), random(3840, 1280, seed=1, device="cuda")
    a, a_scale, _ = operators.quantize_rows(x, left)
    b, _, b_scale = operators.quantize_tensor(w, right)
    out = operators.matmul(a, b, a_scale, b_scale, out_dtype=torch.float32)[::37]
    left64, right64 = a[::37].double() * a_scale[::37, None].double(), b.double() * b_scale.double()
    # Hopper keeps fewer bits of a sum of fp8 products than float32 has: 5.1e-4 was seen on an H100
    assert_near(out, left64 @ right64.T, left64.abs() @ right64.abs().T, tolerance=8e-4)


@pytest.mark.parametrize("width", [768, 1024, 1280, 3072, 4096, 5120])
def test_real_rows(width) -> None:
    """Every launch shape of the tables, the sums over rows included."""
    rows = 4099
    x = random(rows, width, dtype=torch.bfloat16, device="cuda")
    dy = random(rows, width, seed=1, dtype=torch.bfloat16, device="cuda")
    q, scale, sums = operators.quantize_rows(x, INT8, column_sums=True)
    assert_quantized(x, q, scale, 1)
    assert_near(sums, x.double().sum(0), x.double().abs().sum(0))
    packed, q, scale, sums = operators.pack_quantize_rows(x, dy, x, INT8)
    assert torch.equal(packed, torch.cat((x, dy, x), 1))
    assert_quantized(packed, q, scale, 1)
    assert_near(sums, packed.double().sum(0), packed.double().abs().sum(0))
    q, qt, scale = operators.quantize_tensor(x, INT8)
    assert_quantized(x, q, scale, None)
    assert torch.equal(qt, q.T)
    qt, scale = operators.quantize_columns(x, INT8)
    assert_quantized(x, qt.T, scale, 0)

    weight, bias = torch.rand(width, device="cuda") + 0.5, torch.randn(width, device="cuda")
    y, q, scale, mean, rstd = operators.layer_norm_quantize(
        x, weight, bias, 1e-5, out_dtype=torch.bfloat16, dtype=INT8, keep=True
    )
    leaf = x.double().requires_grad_()
    parameters = [t.double().requires_grad_() for t in (weight, bias)]
    exact = torch.nn.functional.layer_norm(leaf, (width,), *parameters, 1e-5)
    assert_near(y, exact.detach(), exact.detach().abs() + 1, tolerance=1e-5)
    assert_quantized(y, q, scale, 1)
    exact.backward(dy.double())
    dx, dw, db, again = operators.layer_norm_backward(dy, x, weight, mean, rstd, x, bias=bias)
    assert torch.equal(again, y)
    largest = (dy.double().abs().amax(1) * rstd.double())[:, None] * 10 + x.double().abs()
    assert_near(dx, leaf.grad + x.double(), largest, tolerance=1e-5)
    assert_near(dw, parameters[0].grad, (dy.double() * 4).abs().sum(0))
    assert_near(db, parameters[1].grad, dy.double().abs().sum(0))

    y, q, scale = operators.gelu_quantize(x, quick=False, dtype=INT8, keep=True)
    assert_near(y, torch.nn.functional.gelu(x.double()), x.double().abs(), tolerance=1e-6)
    assert_quantized(y, q, scale, 1)
    leaf = x.double().requires_grad_()
    torch.nn.functional.gelu(leaf).backward(dy.double())
    dx, q, scale, sums, again = operators.gelu_backward_quantize(dy, x, quick=False, dtype=INT8, keep=True)
    assert torch.equal(again, y)
    assert_near(dx, leaf.grad, dy.double().abs())
    assert_quantized(dx, q, scale, 1)
    assert_near(sums, dx.double().sum(0), dx.double().abs().sum(0))


def test_binaries_are_not_mixed_up() -> None:
    """One kernel after another at shapes, alignments and types for which Triton compiles different binaries."""
    memory = torch.randn(1 << 16, device="cuda")
    cases = [(64, 64, 0), (64, 64, 1), (1, 64, 0), (64, 1, 0), (63, 65, 3), (17, 48, 4), (64, 64, 0), (1, 1, 1)]
    for _ in range(2):
        for rows, cols, offset in cases:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = memory.to(dtype)[offset : offset + rows * cols].view(rows, cols)
                assert_quantized(x, *operators.quantize_rows(x, INT8)[:2], 1)
                q, qt, scale = operators.quantize_tensor(x, INT8)
                assert_quantized(x, q, scale, None)
                assert torch.equal(qt, q.T)
                y, q, scale = operators.gelu_quantize(x, quick=True, dtype=INT8, keep=True)
                assert_quantized(y, q, scale, 1)
                b = integers(24, cols, seed=1, device="cuda")
                ones = torch.ones(rows, device="cuda")
                out = operators.matmul(q, b, ones, torch.ones((), device="cuda"), out_dtype=torch.float32)
                assert torch.equal(out.long(), (q.double() @ b.double().T).long())


def test_kernels_follow_the_current_stream_and_graph() -> None:
    x = torch.randn(64, 96, device="cuda")
    expected = operators.quantize_rows(x, INT8)[0].clone()  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x * 1.0
        q = operators.quantize_rows(y, INT8)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(q, expected)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        q = operators.quantize_rows(static, INT8)[0]
    static.copy_(x)
    graph.replay()
    assert torch.equal(q, expected)


@pytest.mark.parametrize("name", samples("cpu"))
def test_same_inputs_same_bits(name) -> None:
    needs_fp8()
    operator = getattr(torch.ops.clipq, name).default
    for arguments in samples("cuda")[name]:
        first, second = (operator(*arguments) for _ in range(2))
        for a, b in zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (first, second)), strict=True):
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_large_reductions_have_the_same_bits() -> None:
    x, dy = (random(ROWS, 1280, seed=s, dtype=torch.bfloat16, device="cuda") for s in range(2))
    weight, ones = torch.ones(1280, device="cuda"), torch.ones(ROWS, device="cuda")

    def run() -> list[torch.Tensor]:
        return [
            *operators.quantize_rows(x, INT8, column_sums=True),
            *operators.pack_quantize_rows(x, dy, x, INT8),
            *operators.layer_norm_backward(dy, x, weight, ones, ones),
            *operators.gelu_backward_quantize(dy, x, quick=False, dtype=INT8),
        ]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
