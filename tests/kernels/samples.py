"""Arguments for every operator, and the checks of `torch.library` on them."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels.cases import E4M3, E5M2, INT8, integers, random


def samples(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """Operator -> argument lists. No dimension is equal to another one."""
    M, K, N = 18, 40, 24
    x, y = (random(M, K, seed=s, device=device) for s in (0, 1))
    half = x.to(torch.bfloat16)
    seed = torch.tensor(3, device=device)
    vector = lambda n: torch.rand(n, device=device) + 0.5  # noqa: E731
    scalar = torch.tensor(0.5, device=device)
    a, b = integers(M, K, seed=1, device=device), integers(N, K, seed=2, device=device)
    residual = random(M, N, device=device)
    return {
        "quantize_rows": [(x, INT8, True), (half, E4M3, False), (half.T, INT8, True), (x[:0], INT8, True)],
        "pack_quantize_rows": [(x, y, -x, INT8), (half, half[:, :K], half, E4M3), (x.T, y.T, x.T, INT8)],
        "quantize_tensor": [(x, INT8), (half, E5M2), (half.T, INT8), (x[:0], INT8)],
        "quantize_columns": [(x, INT8, seed), (half, E4M3, None), (x.T, INT8, None)],
        "dequantize_rows": [(a, vector(M), torch.bfloat16), (a.T, vector(K), torch.bfloat16)],
        "matmul": [
            (a, b, vector(M), scalar, vector(N), residual, torch.float32),
            (a, b, vector(M), vector(N), None, None, torch.bfloat16),
            (x.to(E5M2), random(N, K, device=device).to(E4M3), vector(M), scalar, None, None, torch.bfloat16),
            (a[:0], b, vector(M)[:0], scalar, None, None, torch.bfloat16),
        ],
        "matmul16": [(half, half.T.contiguous()), (x, y.T)],
        "layer_norm_quantize": [
            (x, vector(K), vector(K), 1e-5, torch.bfloat16, INT8, True),
            (half, vector(K), vector(K), 1e-5, torch.bfloat16, E4M3, False),
            (x.T, vector(M), vector(M), 1e-5, torch.bfloat16, INT8, True),
        ],
        "layer_norm_backward": [
            (y.to(torch.bfloat16), x, vector(K), vector(M), vector(M), x, None),
            (half, half, vector(K), vector(M), vector(M), None, vector(K)),
            (half.T, x.T, vector(M), vector(K), vector(K), y.T, vector(M)),
        ],
        "gelu_quantize": [(half, False, INT8, True), (x, True, E4M3, False), (x.T, False, INT8, True)],
        "gelu_backward_quantize": [
            (half, half, False, INT8, False),
            (x, y, True, E5M2, True),
            (y.T, x.T, False, INT8, True),
        ],
    }


def check(device: str, name: str) -> None:
    operator = getattr(torch.ops.clipq, name).default
    for arguments in samples(device)[name]:
        fp8 = any(isinstance(a, torch.Tensor) and a.dtype in (E4M3, E5M2) for a in arguments)
        # whether arguments were changed is found by computing with them, which fp8 cannot
        tests = ("test_schema",) * (not fp8) + (
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        )
        torch.library.opcheck(operator, arguments, test_utils=tests)
        layouts = [[(t.stride(), t.dtype) for t in _tensors(f(*arguments))] for f in (operator, _faked(operator))]
        assert layouts[0] == layouts[1], f"strides differ from those that torch.compile is told: {layouts}"


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _faked(operator: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call(*arguments: Any) -> Any:
        with FakeTensorMode() as mode:
            return operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))

    return call
