"""Kernels for low-precision training, each as a PyTorch operator `torch.ops.clipq.*`.

A folder holds one family: `reference.py` in plain torch, which the CPU runs and tests compare with, `triton.py` for
CUDA, and `__init__.py`, which registers both under one operator and is what others call. Triton is imported when the
first operator runs on a GPU. The operators have no gradients: `clipq.lowp` builds differentiable functions of them.
`stable_adamw`, which works on lists of tensors in place, is no operator: `clipq.optim` calls it.
"""

from clipq.kernels.gelu import gelu_backward_quantize, gelu_quantize
from clipq.kernels.layer_norm import layer_norm_backward, layer_norm_quantize
from clipq.kernels.matmul import matmul, matmul16
from clipq.kernels.quantize import dequantize_rows, pack_quantize_rows, quantize_columns, quantize_rows, quantize_tensor
from clipq.kernels.register import implementation

__all__ = [
    "dequantize_rows",
    "gelu_backward_quantize",
    "gelu_quantize",
    "implementation",
    "layer_norm_backward",
    "layer_norm_quantize",
    "matmul",
    "matmul16",
    "pack_quantize_rows",
    "quantize_columns",
    "quantize_rows",
    "quantize_tensor",
]
