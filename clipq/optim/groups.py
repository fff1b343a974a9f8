"""Parameter groups: which parameters have weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices and the like with decay; gains, biases and the logit scale without.

    A parameter with fewer than two dimensions is a gain, a bias or a scalar, as in OpenCLIP. Groups name their
    parameters (`param_names`), in the order of `model.named_parameters()`.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = []
    for decay, chosen in (
        (weight_decay, [(n, p) for n, p in named if p.ndim >= 2]),
        (0.0, [(n, p) for n, p in named if p.ndim < 2]),
    ):
        if chosen:
            groups.append(
                {
                    "params": [p for _, p in chosen],
                    "param_names": [n for n, _ in chosen],
                    "weight_decay": decay,
                }
            )
    return groups
