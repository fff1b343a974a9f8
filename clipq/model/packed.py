"""Weights in 8 bits on the disk: a quarter of fp32's bytes, and what low-precision inference would make of them anyway.

Each matrix that a block multiplies with is int8 with a float32 scale for each row, `KEY` and `KEY.scale`; the rest is
float16. Quantizing what comes out of such a file by rows gives the very same 8 bits again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from clipq import kernels

SCALE = ".scale"


def packed(weights: Mapping[str, Tensor], matrices: Collection[str]) -> dict[str, Tensor]:
    """Weights with some matrices in int8, the rest in float16; what is not of a floating type stays as it is.

    Args:
        matrices: their keys.

    Raises:
        ValueError: a weight is not finite, or beyond float16.
    """
    found: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if key in matrices:
            q, scale, _ = kernels.quantize_rows(weight.float(), torch.int8)
            made = {key: q, f"{key}{SCALE}": scale}
        else:
            made = {key: weight.half() if weight.is_floating_point() else weight}
        if not all(t.isfinite().all() for t in made.values()):
            raise ValueError(f"{key} is not finite, or larger than float16 holds: it cannot be packed")
        found |= made
    return found


def unpacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a file in float32, where they are packed; else as they are."""
    int8 = {key for key, weight in weights.items() if weight.dtype is torch.int8}
    scales = {key: scale for key, scale in weights.items() if key.endswith(SCALE) and key.removesuffix(SCALE) in int8}
    if not scales:
        return weights
    found = {key: weight.float() if weight.is_floating_point() else weight for key, weight in weights.items()}
    for key, scale in scales.items():
        del found[key]
        found[key.removesuffix(SCALE)] = weights[key.removesuffix(SCALE)].float() * scale[:, None]
    return found
