"""StableAdamW (AdamW with AdaFactor's update clipping) over many tensors, in two phases.

For each tensor, with its step t counted from 1:

    m_t = β1 m_{t-1} + (1 - β1) g_t        m̂_t = m_t / (1 - β1^t)
    u_t = β2 u_{t-1} + (1 - β2) g_t²       û_t = u_t / (1 - β2^t)
    RMS_t = sqrt(mean(g_t² / max(û_t, ε²)))
    η_t = α_t / max(1, RMS_t / d)
    θ_t = θ_{t-1} - η_t (λ θ_{t-1} + m̂_t / (sqrt(û_t) + ε))

The moments are kept as torch.optim.AdamW keeps them, not yet divided, so a state of either optimizer serves the
other; Wortsman et al. (https://arxiv.org/abs/2304.13013, algorithm 2) write the same with debiased decays. d is 1
there. With a schedule of β2, β2 = 1 - t^(-λ₂) (https://arxiv.org/abs/1804.04235, section 7.2), û_t = u_t.

Phase one gives Σ g² / max(û, ε²) of each tensor and changes nothing; between the phases the sums of a tensor's shards
may be added over processes; phase two does the rest. `reference` goes tensor by tensor, `foreach` is made of torch's
operators over lists, `triton` is a kernel for each phase. All have one function, `step`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """Numbers of one parameter group."""

    lr: float | Tensor
    beta1: float
    beta2: float
    beta2_power: float | None
    """λ₂ of the schedule of β2, which then replaces `beta2`; None for none."""
    eps: float
    weight_decay: float
    clip_threshold: float
    """d; infinity does not clip."""


@dataclass
class Tensors:
    """What a step works on: lists of equal length, tensors of one device. Empty tensors are allowed."""

    params: list[Tensor]
    """θ, any floating type."""
    grads: list[Tensor]
    """g, of any floating type; not changed."""
    exp_avgs: list[Tensor]
    """m, float32 (float64 for float64 parameters)."""
    exp_avg_sqs: list[Tensor]
    """u, as m."""
    steps: list[Tensor]
    """Steps done, [] float32 each; on the CPU or on the parameters' device."""
    numels: list[int]
    """Elements of each whole tensor, of which the lists may hold a shard."""
    groups: list[int]
    """Which of `hypers` each tensor follows."""
    hypers: list[Hyper]
    grad_scale: Tensor | None = None
    """[] what gradients are to be divided by."""
    found_inf: Tensor | None = None
    """[] not 0: do nothing. For `triton` alone."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """What an implementation keeps from one step to the next."""
