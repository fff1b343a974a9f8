"""What a watched step shows besides its loss: RMS_t, magnitudes of features, norms of weights and of their updates.

Everything is computed on the device and read with the loss, some steps later: nothing waits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clipq.model.surgery import blocks
from clipq.optim.shards import local, norms
from clipq.watch.rms import RmsWatch

SHARE = 8
"""One of so many samples of a batch counts for the magnitudes of features."""


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Residual blocks by name, image tower first: clipq's, and those of a timm ViT, which has its own."""
    own: dict[str, nn.Module] = dict(blocks(model))
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    inner = getattr(trunk, "blocks", None)
    if isinstance(inner, nn.Sequential | nn.ModuleList):
        own = {f"visual.trunk.blocks.{name}": block for name, block in inner.named_children()} | own
    return own


class FeatureWatch:
    """Mean |x| of the output of every residual block, over the first eighth of the batch, in the training forward; with
    accumulation, over the first eighth of each micro-batch.

    Its growth over the blocks is what layer scale from zero and 8-bit training are about: section 2.3 of Wortsman et
    al., https://arxiv.org/abs/2304.13013.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        found = residual_blocks(model)
        self.names = list(found)
        self.active = False
        self.micro_batch = 0
        """Of the step, from 0 on, that is next: the means go on from those before it."""
        self._means = torch.full((len(found),), math.nan, device=device)
        for place, block in enumerate(found.values()):
            block.register_forward_hook(self._hook(place))

    def _hook(self, place: int) -> Any:
        @torch.no_grad()
        def hook(block: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.active and block.training and isinstance(output, Tensor):
                some = output.detach()[: max(1, output.shape[0] // SHARE)]
                mean = torch.linalg.vector_norm(some, 1, dtype=torch.float32) / some.numel()
                if self.micro_batch:
                    mean = self._means[place].lerp(mean, 1 / (self.micro_batch + 1))
                self._means[place] = mean

        return hook

    def values(self) -> Tensor:
        """[blocks] float32 of the last step that was watched; a copy."""
        return self._means.clone()


class Watch:
    """Reads the instruments at every `every`-th step.

    Args:
        rms: RMS_t of chosen parameters, or None.
        parameters: name -> parameter whose norm and update norm are read; empty for none. A watched step holds a copy
            of them for the time of the update.
        features: magnitudes of features, or None.
        always: let the features be computed at every step: in a recorded step there is no choosing.
    """

    def __init__(
        self,
        *,
        rms: RmsWatch | None,
        parameters: dict[str, nn.Parameter],
        features: FeatureWatch | None,
        every: int,
        always: bool,
    ) -> None:
        self._rms, self._features = rms, features
        self._names, self._params = list(parameters), list(parameters.values())
        self._every, self._always = every, always
        self._before: list[Tensor] = []

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def before_forward(self, step: int) -> None:
        if self._features is not None:
            self._features.active, self._features.micro_batch = self._always or self.due(step), 0

    def micro_batch(self, n: int) -> None:
        """Micro-batch n of the step, from 0 on, is next."""
        if self._features is not None:
            self._features.micro_batch = n

    def after_forward(self) -> None:
        """All of the step has been through the model: what goes through it again does not count."""
        if self._features is not None:
            self._features.active = False

    @torch.no_grad()
    def before_update(self) -> None:
        self._before = [local(p).clone() for p in self._params]

    @torch.no_grad()
    def after_update(self, bad: Tensor) -> Tensor:
        """All values of the step, float32, in the order that `row` expects; the gradients must still be there.

        Args:
            bad: [], whether the step was refused: its RMS_t is NaN, for moments and gradients do not belong together.
        """
        parts = []
        if self._rms is not None:
            parts.append(self._rms().masked_fill(bad, math.nan))
        if self._features is not None:
            parts.append(self._features.values())
        if self._params:
            now = [local(p) for p in self._params]
            parts.append(norms(self._params, now))
            torch._foreach_sub_(self._before, now)  # pyright: ignore[reportPrivateImportUsage]
            parts.append(norms(self._params, self._before))
            self._before = []
        return torch.cat(parts) if parts else torch.empty(0)

    def row(self, values: list[float]) -> dict[str, dict[str, float]]:
        """Values of `after_update` by instrument and name: what a row of metrics holds."""
        kinds = {
            "rms": [] if self._rms is None else self._rms.names,
            "features": [] if self._features is None else self._features.names,
            "parameter_norm": self._names,
            "update_norm": self._names,
        }
        rest = iter(values)
        return {kind: {name: next(rest) for name in names} for kind, names in kinds.items() if names}
