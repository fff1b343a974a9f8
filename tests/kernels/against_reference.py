"""The Triton kernels against plain torch and float64. Not collected by name: it runs

- with TRITON_INTERPRET=1 on the CPU, in a process of its own, from `test_interpreter.py`;
- compiled, on CUDA, from `test_gpu_kernels.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from clipq.kernels import formats
from clipq.kernels.matmul import triton as tiles
from clipq.kernels.rowwise import multiprocessors
from tests.kernels import emulation
from tests.kernels.cases import (
    E4M3,
    E5M2,
    INT8,
    LAYOUTS,
    LOWP,
    SHAPES,
    TALL,
    implementation,
    integers,
    laid_out,
    padded,
    random,
)
from tests.kernels.emulation import assert_near, assert_quantized

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
reference = implementation("reference")
triton = implementation("triton")
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# the interpreter cuts bfloat16 off, loses the carry where it rounds to fp8, and may lack products of fp8
each_type = pytest.mark.parametrize("dtype", (INT8,) if INTERPRETED else LOWP, ids=str)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter is not exact here")
HALF = torch.float16 if INTERPRETED else torch.bfloat16


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 2e-6) -> None:
    """Equal but for the last bits, where the compiler fuses and divides as it likes."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=rtol, atol=0, equal_nan=True)


# --- quantize


@each_type
@pytest.mark.parametrize("layout", LAYOUTS)
@each_shape
def test_rows(shape, layout, dtype) -> None:
    x = laid_out(random(*shape, dtype=torch.bfloat16, device=DEVICE), layout)
    q, scale, sums = triton.quantize_rows(x, dtype, True)
    assert_quantized(x, q, scale, 1)
    assert_near(sums, x.double().sum(0), x.double().abs().sum(0), tolerance=1e-6)
    plain_q, plain_scale, nothing = triton.quantize_rows(x, dtype, False)
    assert nothing.shape == (0,)
    assert torch.equal(plain_q.cpu().view(torch.uint8), q.cpu().view(torch.uint8))
    assert torch.equal(plain_scale, scale)


@each_type
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (61, 129)], ids=str)
def test_packed_rows(shape, layout, dtype) -> None:
    """The largest value of a row may be in any of the three."""
    parts = [laid_out(random(*shape, seed=s, device=DEVICE).to(torch.float16), layout) for s in range(3)]
    packed, q, scale, sums = triton.pack_quantize_rows(*parts, dtype)
    assert torch.equal(packed, torch.cat(parts, 1))
    assert_quantized(packed, q, scale, 1)
    assert_near(sums, packed.double().sum(0), packed.double().abs().sum(0))


@pytest.mark.parametrize("sums", [False, True])
def test_more_rows_than_programs(sums) -> None:
    shape = TALL if INTERPRETED else (40 * multiprocessors(torch.device("cuda", 0)) + 3, 129)
    x = random(*shape, device=DEVICE)
    q, scale, total = triton.quantize_rows(x, INT8, sums)
    assert_quantized(x, q, scale, 1)
    if sums:
        assert_near(total, x.double().sum(0), x.double().abs().sum(0))


@each_type
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, TALL, (130, 65)], ids=str)
def test_tensor_and_its_transpose(shape, layout, dtype) -> None:
    x = laid_out(random(*shape, device=DEVICE), layout)
    q, qt, scale = triton.quantize_tensor(x, dtype)
    assert scale.shape == ()
    assert_quantized(x, q, scale, None)
    assert torch.equal(qt.cpu().double(), q.cpu().double().T)
    assert qt.stride(0) % formats.ALIGN == 0 or qt.numel() == 0
    assert qt.stride(1) == 1


@each_type
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, TALL], ids=str)
def test_columns(shape, layout, dtype) -> None:
    x = laid_out(random(*shape, dtype=torch.float16, device=DEVICE), layout)
    qt, scale = triton.quantize_columns(x, dtype, None)
    assert_quantized(x, qt.T, scale, 0)


@pytest.mark.parametrize("shape", [*SHAPES, TALL], ids=str)
@pytest.mark.parametrize("seed", [0, 123_456_789, 2**31 - 1])
def test_stochastic_rounding_draws_the_same_bits(shape, seed) -> None:
    x = random(*shape)
    x[:1] = 2.0**12  # scales that are the same wherever they are computed
    ours = triton.quantize_columns(*on_device(x), INT8, torch.tensor(seed, device=DEVICE))
    theirs = reference.quantize_columns(x, INT8, torch.tensor(seed))
    different = (ours[0].cpu() != theirs[0]).float().mean() if x.numel() else torch.tensor(0.0)
    assert different == 0 if INTERPRETED else different < 1e-3
    assert (ours[0].cpu().int() - theirs[0].int()).abs().sum() <= different * x.numel() + 0.5
    assert_same(ours[1], theirs[1])


@each_type
@each_shape
def test_dequantize(shape, dtype) -> None:
    q, scale, _ = reference.quantize_rows(random(*shape), dtype, False)
    ours = triton.dequantize_rows(*on_device(q, scale), torch.float32)
    assert_same(ours, reference.dequantize_rows(q, scale, torch.float32), rtol=0)


# --- products


PRODUCTS = [(1, 1, 1), (17, 33, 16), (5, 128, 129), (130, 140, 300), (257, 16, 64)]


def product_arguments(M: int, N: int, *, row: bool, column: bool, bias: bool, residual: torch.dtype | None) -> list:
    g = torch.Generator().manual_seed(M + N)
    return [
        torch.rand(M, generator=g) * 1e-3 if row else torch.tensor(0.3),
        torch.rand(N, generator=g) if column else torch.tensor([0.7]),
        torch.randn(N, generator=g, dtype=torch.float32).to(torch.float16) if bias else None,
        torch.randn(M, N, generator=g).to(residual) if residual else None,
    ]


def multiply(tma: bool, a: Tensor, b: Tensor, args: list, out: torch.dtype, tile: tiles.Tile | None = None) -> Tensor:
    """One of the two kernels, whatever the device would have chosen."""
    c = padded(torch.full((a.shape[0], b.shape[0]), 77.0, dtype=out, device=DEVICE))
    *small, residual = on_device(*args)
    if not tma:
        c = c.contiguous()
        tiles.launch_pointers(tile or tiles.POINTER_TILE, *on_device(a, b), c, *small, residual)
        return c
    a, b, residual = (None if t is None else padded(t) for t in on_device(a, b, residual))
    chosen = tile or tiles.hopper_tile(
        a.shape[1], int8=a.dtype is INT8, residual=residual is not None, out_bytes=out.itemsize
    )
    tiles.launch_tma(chosen, a, b, c, *small, residual)
    return c


@pytest.fixture(params=[True, False], ids=["tma", "pointers"])
def tma(request) -> bool:
    if request.param and not INTERPRETED and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("TMA needs Hopper")
    return request.param


@pytest.mark.parametrize(
    ("row", "column", "bias", "residual"),
    [
        (True, False, True, None),
        (True, True, True, None),
        (False, True, False, None),
        (False, False, False, None),
        (True, False, True, torch.float32),
        (True, True, False, torch.float32),
    ],
)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_int8_product(shape, row, column, bias, residual, tma) -> None:
    M, N, K = shape
    a, b = integers(M, K, seed=1), integers(N, K, seed=2)
    args = product_arguments(M, N, row=row, column=column, bias=bias, residual=residual)
    ours = multiply(tma, a, b, args, torch.float32).cpu()
    theirs = reference.matmul(a, b, *args, torch.float32)
    if INTERPRETED:
        assert torch.equal(ours, theirs)
    terms = [theirs.abs()] + [t.abs().float() for t in args[2:] if t is not None]
    assert_near(ours, theirs.double(), sum(t.double() for t in terms), tolerance=5e-7)


@pytest.mark.parametrize("out", sorted({HALF, torch.float16}, key=str), ids=str)
def test_16_bit_product_with_a_residual_is_rounded_once(out, tma) -> None:
    a, b = integers(40, 48, seed=3), integers(24, 48, seed=4)
    args = product_arguments(40, 24, row=True, column=False, bias=True, residual=out)
    ours = multiply(tma, a, b, args, out).cpu()
    exact = reference.matmul(a, b, *args[:3], args[3].float(), torch.float32)
    assert ((ours.float() - exact).abs() <= emulation.EPS[out] / 2 * exact.abs() * 1.001 + 1e-6).all()


@pytest.mark.parametrize("inner", [64, 3072, 5120])
@pytest.mark.parametrize("residual", [None, HALF, torch.float32], ids=str)
def test_every_tile_of_hopper_sums_exactly(inner, residual, tma) -> None:
    """Around the borders of tiles: a row and a column more than a tile has."""
    if not tma and inner != 64:
        pytest.skip("one tile for all")
    M, N = (129, 264) if inner == 64 else (3, 264)
    a, b = (integers(rows, inner, seed=rows) // (8 if HALF is torch.float16 else 1) for rows in (M, N))
    out = residual or torch.float32
    unit = [torch.ones(M), torch.ones(()), None, None if residual is None else torch.zeros(M, N, dtype=out)]
    ours = multiply(tma, a, b, unit, out).cpu()
    exact = (a.long() @ b.long().T).float()
    assert torch.equal(ours, exact.to(out))


@pytest.mark.parametrize("residual", [False, True])
def test_long_sums_of_int8_are_cut(residual, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "MOST_TERMS", 64)
    a, b = integers(33, 200, seed=1), integers(17, 200, seed=2)
    args = product_arguments(33, 17, row=True, column=True, bias=True, residual=torch.float32 if residual else None)
    ours = triton.matmul(*on_device(a, b, *args), torch.float32)
    scales = args[0].double()[:, None] * args[1].double()
    added = sum((t.double() for t in args[2:] if t is not None), torch.zeros(17).double())
    exact, magnitude = a.double() @ b.double().T * scales + added, a.double().abs() @ b.double().abs().T * scales
    assert_near(ours, exact, magnitude + added.abs(), tolerance=1e-6)


def test_sums_of_nothing() -> None:
    a, b = (torch.zeros(n, 0, dtype=INT8, device=DEVICE) for n in (3, 5))
    ours = triton.matmul(a, b, *on_device(torch.ones(3), torch.ones(5), torch.arange(5.0)), None, torch.float32)
    assert torch.equal(ours.cpu(), torch.arange(5.0).expand(3, 5))


def test_vectors_need_not_be_dense() -> None:
    """Scales of a whole matrix expanded to rows, every second element of a bias."""
    a, b = integers(9, 48, seed=3), integers(6, 48, seed=4)
    bias = torch.arange(12.0)[::2]
    vectors = [
        (torch.tensor(0.3, device=d).expand(9), torch.tensor([0.7], device=d).expand(6), bias.to(d), None)
        for d in ("cpu", DEVICE)
    ]
    args, moved = vectors[0], [*vectors[1][:2], torch.arange(12.0, device=DEVICE)[::2], None]
    expected = reference.matmul(a, b, *args, torch.float32)
    assert_same(triton.matmul(*on_device(a, b), *moved, torch.float32), expected, rtol=1e-5)
    q, _, _ = reference.quantize_rows(random(9, 5), INT8, False)
    assert_same(
        triton.dequantize_rows(q.to(DEVICE), moved[0], torch.float32),
        reference.dequantize_rows(q, args[0], torch.float32),
    )
    x, weights = random(9, 6), torch.randn(12)[::2]
    expected = reference.layer_norm_quantize(x, weights, bias, 1e-3, torch.float32, INT8, True)
    strided = [torch.stack((t, t), 1).to(DEVICE)[:, 0] for t in (weights, bias)]
    ours = triton.layer_norm_quantize(x.to(DEVICE), *strided, 1e-3, torch.float32, INT8, True)
    torch.testing.assert_close(ours[0].cpu(), expected[0], rtol=1e-5, atol=2e-5)


def test_no_tokens_and_strided_operands() -> None:
    a, b = integers(0, 32, seed=1, device=DEVICE), integers(8, 32, seed=2, device=DEVICE)
    assert triton.matmul(a, b, *on_device(torch.ones(0), torch.ones(1)), None, None, torch.bfloat16).shape == (0, 8)
    a = integers(9, 48, seed=3, device=DEVICE)
    exact = (a[:, 3:35].cpu().long() @ b.cpu().long().T).float()
    for left in (a[:, 3:35], a[:, 3:35].T.contiguous().T):
        ours = triton.matmul(left, b, *on_device(torch.ones(9), torch.ones(1)), None, None, torch.float32)
        assert torch.equal(ours.cpu(), exact)


@not_interpreted
@pytest.mark.parametrize(("left", "right"), [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("shape", [*PRODUCTS, (300, 264, 3072)], ids=str)
def test_fp8_product(shape, left, right, tma) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")
    M, N, K = shape
    a, a_scale, _ = reference.quantize_rows(random(M, K), left, False)
    b, b_scale, _ = reference.quantize_rows(random(N, K, seed=1), right, False)
    ours = multiply(tma, a, b, [a_scale, b_scale, None, None], torch.float32)
    scales = a_scale.double()[:, None] * b_scale.double()
    exact, magnitude = a.double() @ b.double().T * scales, a.double().abs() @ b.double().abs().T * scales
    # tensor cores keep about 13 bits of a partial sum; the noise of quantization is about 1e-3
    assert_near(ours, exact, magnitude, tolerance=5e-4)


# --- layer norm


def norm_parameters(cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(cols)
    return (1 + 0.3 * torch.randn(cols, generator=g)).to(dtype), torch.randn(cols, generator=g).to(dtype)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@each_type
@pytest.mark.parametrize("layout", LAYOUTS)
@each_shape
def test_layer_norm(shape, layout, dtype, parameters) -> None:
    x = laid_out(random(*shape, device=DEVICE), layout)
    weight, bias = on_device(*norm_parameters(shape[1], parameters))
    y, q, scale, mean, rstd = triton.layer_norm_quantize(x, weight, bias, 1e-3, torch.float32, dtype, True)
    expected = reference.layer_norm_quantize(x.cpu(), weight.cpu(), bias.cpu(), 1e-3, torch.float32, dtype, True)
    torch.testing.assert_close(y.cpu(), expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(mean.cpu(), expected[3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rstd.cpu(), expected[4], rtol=1e-5, atol=0)
    assert_quantized(y, q, scale, 1)
    nothing, again, *_ = triton.layer_norm_quantize(x, weight, bias, 1e-3, torch.float32, dtype, False)
    assert nothing.shape == (0,)
    assert torch.equal(again.cpu().view(torch.uint8), q.cpu().view(torch.uint8))


def test_layer_norm_quantizes_what_it_rounded() -> None:
    x = random(11, 96, dtype=torch.float16, device=DEVICE)
    weight, bias = on_device(*norm_parameters(96, torch.float32))
    y, q, scale, *_ = triton.layer_norm_quantize(x, weight, bias, 1e-5, torch.float16, INT8, True)
    assert y.dtype is torch.float16
    assert_quantized(y, q, scale, 1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (61, 129)], ids=str)
def test_layer_norm_backward(shape, layout, residual) -> None:
    x, dy = laid_out(random(*shape, device=DEVICE), layout), random(*shape, seed=1, device=DEVICE)
    weight, bias = norm_parameters(shape[1], torch.float32)
    _, _, _, mean, rstd = reference.layer_norm_quantize(x.cpu(), weight, bias, 1e-3, torch.float32, INT8, True)
    around = random(*shape, seed=2, device=DEVICE) if residual else None
    args = (dy, x, *on_device(weight, mean, rstd), around)
    ours = triton.layer_norm_backward(*args, None)
    theirs = reference.layer_norm_backward(*(None if t is None else t.cpu() for t in args), None)
    for name, a, b in zip(("x", "weight", "bias", "nothing"), ours, theirs, strict=True):
        limit = 1e-5 * b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=limit, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("out", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (61, 129)], ids=str)
def test_recomputed_norm_has_the_bits_of_the_forward(shape, out) -> None:
    x, dy = random(*shape, device=DEVICE), random(*shape, seed=1, device=DEVICE).to(out)
    weight, bias = on_device(*norm_parameters(shape[1], torch.float32))
    y, _, _, mean, rstd = triton.layer_norm_quantize(x, weight, bias, 1e-3, out, INT8, True)
    *gradients, again = triton.layer_norm_backward(dy, x, weight, mean, rstd, None, bias)
    assert torch.equal(again, y)
    for a, b in zip(gradients, triton.layer_norm_backward(dy, x, weight, mean, rstd, None, None), strict=False):
        assert torch.equal(a, b)


# --- GELU


@pytest.mark.parametrize("quick", [False, True])
@each_type
@pytest.mark.parametrize("layout", LAYOUTS)
@each_shape
def test_gelu(shape, layout, dtype, quick) -> None:
    x = laid_out(random(*shape, device=DEVICE), layout)
    y, q, scale = triton.gelu_quantize(x, quick, dtype, True)
    limit = 1e-7 * x.abs().amax().item() if x.numel() else 0
    torch.testing.assert_close(y.cpu().double(), emulation.gelu(x.cpu().double(), quick), rtol=2e-6, atol=limit)
    assert_quantized(y, q, scale, 1)
    nothing, again, _ = triton.gelu_quantize(x, quick, dtype, False)
    assert nothing.shape == (0,)
    assert torch.equal(again.cpu().view(torch.uint8), q.cpu().view(torch.uint8))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (61, 129)], ids=str)
def test_gelu_backward(shape, layout, quick) -> None:
    x, dy = (laid_out(random(*shape, seed=s, device=DEVICE), layout) for s in (0, 1))
    dx, q, scale, sums, nothing = triton.gelu_backward_quantize(dy, x, quick, INT8, False)
    assert nothing.shape == (0,)
    *same, y = triton.gelu_backward_quantize(dy, x, quick, INT8, True)
    assert torch.equal(y, triton.gelu_quantize(x, quick, INT8, True)[0])
    for a, b in zip(same, (dx, q, scale, sums), strict=True):
        assert torch.equal(a, b)
    v = x.cpu().double().requires_grad_()
    emulation.gelu(v, quick).backward(dy.cpu().double())
    limit = 3e-7 * dy.abs().amax().item() if dy.numel() else 0
    torch.testing.assert_close(dx.cpu().double(), v.grad, rtol=3e-6, atol=limit)
    assert_quantized(dx, q, scale, 1)
    assert_near(sums, dx.double().sum(0), dx.double().abs().sum(0))
