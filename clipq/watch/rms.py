"""RMS_t of chosen parameters: how far the second moment of a tensor is behind its gradients.

RMS_t = sqrt(mean(g_t² / max(û_t, ε²))), about 1 in quiet training; in the paper a value of 2.3 and more in the patch
embedding comes 1 to 8 steps before a loss spike. Source: Wortsman et al., https://arxiv.org/abs/2304.13013, section 3.
"""

from __future__ import annotations

import fnmatch
import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from clipq.kernels.stable_adamw.reference import least
from clipq.optim.shards import local, local_grad, reducer
from clipq.optim.stable_adamw import StableAdamW

DEFAULT = "default"


def choose(model: nn.Module, patterns: list[str]) -> dict[str, nn.Parameter]:
    """The trained parameters whose names match any of the patterns, in the order of the model.

    Args:
        patterns: as of a shell (`visual.*`), or "default": patch embedding, token and position embeddings, logit scale,
            and of the first and last block of each tower the two largest matrices that a norm feeds.

    Raises:
        ValueError: a pattern that nothing matches.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    chosen: set[str] = set()
    for pattern in patterns:
        found = _default(model) & named.keys() if pattern == DEFAULT else set(fnmatch.filter(named, pattern))
        if not found:
            near = ", ".join(list(named)[:3])
            raise ValueError(f"{pattern!r} matches no trained parameter; they are named {near}, …")
        chosen |= found
    return {n: p for n, p in named.items() if n in chosen}


EMBEDDINGS = ("token_embedding.weight", "positional_embedding", "pos_embed", "word_embeddings.weight")
"""Ends of the names of embeddings: OpenCLIP's own, timm's and Hugging Face's."""
FED_BY_NORM = ("attn.in_proj.weight", "attn.qkv.weight", "mlp.c_fc.weight", "mlp.fc1.weight")
"""Likewise of matrices in a block: of clipq's, and of timm's ViTs."""


def patch_embedding(model: nn.Module) -> str | None:
    """Name of the weight that reads the pixels: the first convolution of the image tower; None if it has none."""
    convolutions = (n for n, m in model.named_modules() if n.startswith("visual.") and isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    return None if first is None else f"{first}.weight"


def _default(model: nn.Module) -> set[str]:
    found = {"logit_scale", patch_embedding(model) or ""}
    towers: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if name.endswith(EMBEDDINGS):
            found.add(name)
        if name.endswith(FED_BY_NORM):
            block = next(name.removesuffix(f".{end}") for end in FED_BY_NORM if name.endswith(end))
            towers.setdefault(block.rpartition(".")[0], []).append(name)
    for names in towers.values():  # two of each block, in the order of blocks
        found |= {*names[:2], *names[-2:]}
    return found


class RmsWatch:
    """RMS_t of parameters after a step, without waiting for the device.

    Args:
        params: name -> parameter.
        optimizer: `StableAdamW`, which has computed it, or torch's `AdamW`, from whose state it is computed.
    """

    def __init__(self, params: dict[str, nn.Parameter], optimizer: AdamW | StableAdamW) -> None:
        self.names = list(params)
        self._params, self._optimizer = list(params.values()), optimizer

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """[names] float32 of the step that was just made, to be called before the gradients are dropped.

        NaN for a parameter without a gradient, or with one that is not finite.
        """
        nan = torch.full((), math.nan, device=local(self._params[0]).device)
        if isinstance(self._optimizer, StableAdamW):
            known = self._optimizer.rms
            return torch.stack([known.get(p, nan).float() for p in self._params])
        settings = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        have = [p for p in self._params if p.grad is not None and p in self._optimizer.state]
        sums = [_ratio_sum(p, self._optimizer.state[p], settings[p]) for p in have]
        if not have:
            return nan.expand(len(self._params)).clone()
        total, reduce = torch.stack(sums), reducer(list(have))
        total = total if reduce is None else reduce(total)
        rms = {p: (t / max(1, p.numel())).sqrt() for p, t in zip(have, total.unbind(), strict=True)}
        values = torch.stack([rms.get(p, nan) for p in self._params])
        return torch.where(values.isfinite(), values, nan)


def _ratio_sum(p: nn.Parameter, state: dict[str, Tensor], group: dict[str, object]) -> Tensor:
    betas: tuple[float, float] = group["betas"]  # pyright: ignore[reportAssignmentType]
    eps: float = group["eps"]  # pyright: ignore[reportAssignmentType]
    assert p.grad is not None
    grad, moment = local_grad(p).float(), local(state["exp_avg_sq"]).float()
    correction = (1 - betas[1] ** state["step"].double()).float().to(grad.device, non_blocking=True)
    return (grad.square() / (moment / correction).clamp(min=least(eps, torch.float32))).sum()
