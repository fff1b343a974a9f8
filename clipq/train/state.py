"""All that changes while a run trains, and so all that a checkpoint holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from clipq.data.loader import StreamPlace
from clipq.dist.gather import gather_objects
from clipq.optim.loss_scale import FixedLossScaler
from clipq.optim.shards import laid_out_as
from clipq.watch.spikes import SpikeDetector

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Model, optimizer, loss scaler and counters of a run."""

    model: nn.Module
    """The bare model, not wrapped for DDP; FSDP shards it in place."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | FixedLossScaler
    step: int = 0
    """Optimizer steps done."""
    place: StreamPlace | None = None
    """Where this rank is in the data: further than its steps say where the guard went back. None before the first."""
    samples: int = 0
    """Pairs seen over all ranks."""
    seconds: float = 0.0
    """Training time."""
    spikes: SpikeDetector = field(default_factory=SpikeDetector)
    learned: float | None = None
    """Mean of the loss that the guard holds losses against, as of when numbers were last read."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's weights, in tensors and plain values. Collective: every rank must call it.

        Tensors are the optimizer's own, and what FSDP shards is in shards.
        """
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "step": self.step,
            "data": self._place(),
            "samples": self.samples,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "spikes": self.spikes.state_dict(),
            "learned": self.learned,
            "rng": gather_objects(rng),
        }

    def _sharded(self, saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """An optimizer's state by parameter, with the moments sharded as the parameters are."""
        numbers = [n for group in saved["param_groups"] for n in group["params"]]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        of = dict(zip(numbers, params, strict=True))
        return {
            number: {
                name: laid_out_as(of[number], v) if v.shape == of[number].shape else v for name, v in values.items()
            }
            for number, values in saved["state"].items()
        }

    def _place(self) -> dict[str, Any] | None:
        places = gather_objects(self.place)
        whole = StreamPlace.of_all(places) if self.place is not None else None
        return None if whole is None else {"drawn": whole.drawn, "lanes": whole.lanes}

    def load_state_dict(self, saved: dict[str, Any], *, rank: int, world_size: int) -> None:
        """Takes over what `state_dict` gave; generators only if the number of ranks is the same.

        The optimizer's settings stay those of now: who resumes with another beta2 means it.
        """
        self.step, self.samples = saved["step"], saved["samples"]
        if saved["data"] is not None:
            self.place = StreamPlace(**saved["data"]).of_rank(rank, world_size)
        self.seconds = saved["seconds"]
        self.spikes.load_state_dict(saved["spikes"])
        self.learned = saved["learned"]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        # before loading: by `fused` torch decides where the counts of steps are to lie
        groups = [old | own for old, own in zip(saved["optimizer"]["param_groups"], settings, strict=True)]
        moments = self._sharded(saved["optimizer"])
        self.optimizer.load_state_dict({**saved["optimizer"], "state": moments, "param_groups": groups})
        dynamic = isinstance(self.scaler, torch.amp.GradScaler) and self.scaler.is_enabled()
        if dynamic and "scale" not in saved["scaler"]:
            log.warning("the checkpoint has no dynamic loss scale: it begins at %g", self.scaler.get_scale())
        else:
            self.scaler.load_state_dict(saved["scaler"])
        if len(saved["rng"]) == world_size:
            rng = saved["rng"][rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng["cuda"])
