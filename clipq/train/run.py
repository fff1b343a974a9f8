"""What a training run consists of, and how it ends badly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipq.data.filters import told
from clipq.data.loader import StreamPlace
from clipq.dist.env import DistEnv
from clipq.dist.shard import Sharded
from clipq.dist.stop import Stop
from clipq.dist.watchdog import Progress
from clipq.eval.common import Encoder, Evaluator
from clipq.log.console import Console
from clipq.log.writers import Row, Writer
from clipq.loss.contrastive import contrastive_loss
from clipq.train.checkpoint import Checkpoints
from clipq.train.graph import Graphed
from clipq.train.guard import Guard, Statistics
from clipq.train.schedule import Schedule
from clipq.train.state import TrainState
from clipq.train.straggler import Stragglers
from clipq.watch.instruments import Watch


class Normalize:
    """uint8 images [B, 3, H, W] on `device` -> fp32, mean removed and divided by the standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._shift = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._scale = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        return (image_BCHW.float() - self._shift) / self._scale


COLUMNS = ("loss", "logit_scale", "max_logit", "image_finite", "text_finite", "grad_norm", "bad")
"""Numbers of a step that stay on the device until they are read; `*_finite`: whether the features of a tower are."""


@torch.no_grad()
def numbers_of(
    loss: Tensor, largest: Tensor, image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, *_: Tensor
) -> Tensor:
    """The first five of `COLUMNS`, of this rank's pairs: of what the loss gives, and of what it takes."""
    finite = [features.isfinite().all().float() for features in (image_BD, text_BD)]
    return torch.stack((loss, logit_scale.float(), largest, *finite))


@dataclass
class Pending:
    """A step whose numbers are still on the device."""

    row: Row
    numbers: Tensor
    """What `COLUMNS` names, float32."""
    norms: Tensor
    """2-norm of each parameter's gradient."""
    watched: Tensor | None
    """What the instruments show, where the step is watched."""
    keys: list[str]
    """Samples of this rank's batch."""
    lost: int
    """Samples and shards that could not be read meanwhile, on this rank."""
    filtered: dict[str, int]
    """Samples that were left out meanwhile on this rank, for each reason that there may be."""
    sources: dict[str, int]
    """Samples of each source in this rank's batch, where there are several."""


@dataclass
class Filtered:
    """What was left out since this process began, on all ranks."""

    since: int
    """Step at which it began."""
    reasons: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    """Samples that were trained on."""
    told: int = 0
    """Of these, when it was last told."""

    def add(self, reasons: dict[str, int], kept: int) -> None:
        self.reasons.update(reasons)
        self.kept += kept

    def news(self) -> str | None:
        """What to tell where the run is twice as far as when it was last told: early, and never often."""
        count = self.reasons.total()
        if not count or self.kept < 2 * self.told:
            return None
        self.told = self.kept
        whole = count + self.kept
        return f"{count:,} of {whole:,} samples were left out since step {self.since}: {told(self.reasons)}"


@dataclass
class Run:
    """All that the loop needs, put together by `clipq.build`."""

    env: DistEnv
    state: TrainState
    model: nn.Module
    """What is called: the state's model, or DDP around it."""
    normalize: Normalize
    schedule: Schedule
    loader: Callable[[StreamPlace | None], Generator[dict[str, Any]]]
    """Where to begin -> endless batches of this rank, as of `clipq.data.loader.batches`."""
    loader_info: dict[str, int]
    encoder: Encoder
    evaluators: Sequence[Evaluator]
    checkpoints: Checkpoints
    console: Console
    writers: Sequence[Writer]
    folder: Path
    steps: int
    batch_size: int
    """Pairs in a step over all ranks."""
    accumulation: int
    """Micro-batches that this rank's part of them goes through the model in."""
    autocast: torch.dtype | None
    flops_per_image: float
    """Of one pair, forward and backward."""
    guard: Guard
    watch: Watch
    loss: Callable[..., tuple[Tensor, Tensor]] = contrastive_loss
    """Features of images and of texts, logit scale and, if the model has one, logit bias -> loss and largest logit."""
    graph: Graphed | None = None
    """`forward_backward` of this run as a CUDA graph; None calls it as it is."""
    sharded: Sharded | None = None
    """What FSDP leaves to be done, where it shards the model."""
    clip_norm: float | None = None
    max_logit_scale: float = 100.0
    log_every: int = 10
    eval_every: int = 0
    profile: tuple[int, int] | None = None
    quantization_every: int = 0
    refused: bool = False
    """Whether the guard refused the last step that was read."""
    overflows: int = 0
    """Steps in a row, the last that was read among them, that a dynamic loss scale left out."""
    stop: Stop = field(default_factory=Stop)
    progress: Progress = field(default_factory=Progress)
    stragglers: Stragglers = field(default_factory=Stragglers)
    filtered: Filtered = field(init=False)
    statistics: Statistics = field(init=False)
    pending: list[Pending] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.filtered = Filtered(self.state.step)
        self.statistics = Statistics(self.state.model)

    def forward(self, model: nn.Module, image_BCHW: Tensor, text_BL: Tensor) -> list[Tensor]:
        """What the loss takes: features of images and texts, logit scale and, if the model has one, logit bias.

        Args:
            model: `self.model` or `self.state.model`.
            image_BCHW: uint8, and
            text_BL: tokens, on the CPU or the device.
        """
        device = self.env.device
        image_BCHW = self.normalize(image_BCHW.to(device, non_blocking=True))
        text_BL = text_BL.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            out = model(image_BCHW, text_BL)
        return [out[key] for key in ("image_features", "text_features", "logit_scale", "logit_bias") if key in out]

    def facts(self) -> dict[str, Any]:
        """What environment.json says of the run besides the machine."""
        return {
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "gflops_per_image": round(self.flops_per_image / 1e9, 3),
        }


class DivergedError(RuntimeError):
    """The loss, its gradients or the weights went bad beyond what the guard may mend; nothing was saved since."""


def diverged(run: Run, what: str, *, mend: str = "or choose another guard.policy") -> DivergedError:
    path = run.checkpoints.newest()
    kept = f"the newest checkpoint, {path}, has finite weights" if path else "there is no checkpoint yet"
    return DivergedError(f"{what}: lower optim.lr, lengthen schedule.warmup, set optim.clip_norm, {mend}; {kept}")


def write(run: Run, rows: Sequence[Row]) -> None:
    for writer in run.writers:
        writer.write(rows)


def close(run: Run) -> None:
    for writer in run.writers:
        writer.close()
