"""The losses as their papers define them, on whole matrices: what the tiled ones are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss_of_pairs(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Radford et al. 2021: for each pair the mean of both cross entropies, [pairs]."""
    logits = scale * image @ text.T
    own = torch.arange(len(logits))
    return (-logits.log_softmax(1)[own, own] - logits.log_softmax(0)[own, own]) / 2


def sigmoid_loss_of_images(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Zhai et al. 2023, algorithm 1: for each image the sum over texts, [pairs]."""
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -(1 / (1 + (-labels * logits).exp())).log().sum(1)


def features(pairs: int, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Image and text features of length 1, leaves of autograd."""
    g = torch.Generator().manual_seed(seed)
    drawn = (F.normalize(torch.randn(pairs, width, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x in drawn]


def value_and_gradients(loss: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The loss and its gradients, computed on copies."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]
