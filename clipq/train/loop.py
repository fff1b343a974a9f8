"""The training loop: the algorithm, top to bottom.

Shape suffixes: B pairs on this rank, C colours, H height, W width, L tokens of context, D features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipq.dist.env import DistEnv
from clipq.dist.gather import gather_objects
from clipq.eval.common import Encoder, Evaluator
from clipq.log.console import Console
from clipq.log.meters import Meter
from clipq.log.writers import Row, Writer, evaluated
from clipq.loss.contrastive import contrastive_loss
from clipq.optim.loss_scale import FixedLossScaler
from clipq.train.checkpoint import Checkpoints
from clipq.train.graph import Graphed
from clipq.train.profile import profiler
from clipq.train.schedule import Schedule
from clipq.train.state import TrainState
from clipq.watch.rms import RmsWatch

log = logging.getLogger(__name__)


class Normalize:
    """uint8 images [B, 3, H, W] on `device` -> fp32, mean removed and divided by the standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._shift = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._scale = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        return (image_BCHW.float() - self._shift) / self._scale


@dataclass
class Run:
    """All that the loop needs, put together by `clipq.build`."""

    env: DistEnv
    state: TrainState
    model: nn.Module
    """What is called: the state's model, or DDP around it."""
    normalize: Normalize
    schedule: Schedule
    loader: Callable[[int], Iterator[dict[str, Tensor]]]
    """Step -> endless batches of this rank after that step: {"image": [B, 3, H, W] uint8, "text": [B, L]}."""
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
    autocast: torch.dtype | None
    flops_per_image: float
    """Of one pair, forward and backward."""
    graph: Graphed | None = None
    """`forward_backward` of this run as a CUDA graph; None calls it as it is."""
    clip_norm: float | None = None
    max_logit_scale: float = 100.0
    log_every: int = 10
    eval_every: int = 0
    profile: tuple[int, int] | None = None
    rms: RmsWatch | None = None
    """Watches RMS_t of parameters; None watches none."""
    pending: list[tuple[Row, Tensor, Tensor | None]] = field(default_factory=list)
    """Steps whose numbers, and RMS_t, are still on the device."""

    def facts(self) -> dict[str, Any]:
        """What environment.json says of the run besides the machine."""
        return {
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "gflops_per_image": round(self.flops_per_image / 1e9, 3),
        }


class NonFiniteError(RuntimeError):
    """The loss or a weight is NaN or infinite; nothing was saved since."""


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the last, is done after this one."""
    return step == last or (every > 0 and step % every == 0)


def train(run: Run) -> None:
    """Trains from the state's step to the last.

    Raises:
        NonFiniteError: the loss or the weights went bad; no such weights were saved.
        CheckpointError: a checkpoint could not be written.
        EvalError: an evaluator cannot use its data; the same command evaluates again.
    """
    state = run.state
    first = state.step + 1
    meter = Meter(
        seconds=state.seconds,
        device=run.env.device,
        flops_per_image=run.flops_per_image,
        world_size=run.env.world_size,
    )
    batches = run.loader(state.step)
    late = owed(run)
    if late:
        with meter.paused():
            evaluate(run, late)
    run.model.train()
    with profiler(run.profile, after=state.step, folder=run.folder, env=run.env) as profiling:
        for step in range(first, run.steps + 1):
            with meter.waiting():
                batch = next(batches)
            lr = run.schedule(step)
            numbers, rms = train_step(run, batch, lr)
            state.step, state.samples, state.seconds = step, state.samples + run.batch_size, meter.seconds()
            meter.count(run.batch_size)
            row = {
                "kind": "train",
                "step": step,
                "samples": state.samples,
                "seconds": state.seconds,
                "lr": lr,
            }
            run.pending.append((row, numbers, rms))

            evaluating = bool(run.evaluators) and due(step, run.eval_every, run.steps)
            logging_now = due(step, run.log_every, run.steps)
            saving = step == run.steps or run.checkpoints.due(step, ask_clock=logging_now)
            # Numbers are read (and so checked) before anything is built on the weights that gave them.
            if logging_now or evaluating or saving:
                flush(run, meter, show=logging_now)
            if saving:
                with meter.paused():
                    require_finite_weights(run)
                    run.checkpoints.save(state, loader=run.loader_info)
            if evaluating:  # after the save, so that a fault in an evaluation costs no training
                with meter.paused():
                    evaluate(run, run.evaluators)
            if profiling is not None:
                profiling.step()


def train_step(run: Run, batch: dict[str, Tensor], lr: float) -> tuple[Tensor, Tensor | None]:
    """One optimizer step; does not wait for the device.

    Returns:
        [loss, logit scale, gradient norm or NaN], and RMS_t of the watched parameters where the step is watched.
    """
    state = run.state
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if run.graph is None or not run.graph.recorded:  # a recorded backward overwrites the gradients
        state.optimizer.zero_grad(set_to_none=True)
    if run.graph is None:
        loss_and_scale = forward_backward(run, batch["image"], batch["text"])
    else:
        loss_and_scale = run.graph(batch["image"], batch["text"])

    norm = torch.full((1,), math.nan, device=run.env.device)
    watch = run.rms if run.rms is not None and (state.step + 1) % run.rms.every == 0 else None
    if run.clip_norm is not None or watch is not None:
        state.scaler.unscale_(state.optimizer)
    if run.clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), run.clip_norm).view(1)
    state.scaler.step(state.optimizer)
    rms = None if watch is None else watch()
    state.scaler.update()
    if isinstance(state.scaler, FixedLossScaler) and state.scaler.left_out:
        left_out(run, state.scaler.left_out)
    with torch.no_grad():
        logit_scale: Any = state.model.logit_scale
        logit_scale.clamp_(0, math.log(run.max_logit_scale))
    return torch.cat((loss_and_scale, norm.detach().float())), rms


def left_out(run: Run, names: list[str]) -> None:
    """Says which parameters a step left out, since their gradients overflowed."""
    step = run.state.step + 1
    write(run, [{"kind": "event", "step": step, "event": "gradient overflow", "parameters": names}])
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    log.warning("step %d: gradient of %s%s not finite: left out of the step", step, names[0], more)


def forward_backward(run: Run, image_BCHW: Tensor, text_BL: Tensor) -> Tensor:
    """Gradients of a batch into the parameters; returns [loss, logit scale] on the device."""
    device = run.env.device
    image_BCHW = run.normalize(image_BCHW.to(device, non_blocking=True))
    text_BL = text_BL.to(device, non_blocking=True)
    with torch.autocast(device.type, dtype=run.autocast or torch.bfloat16, enabled=run.autocast is not None):
        out = run.model(image_BCHW, text_BL)
    loss = contrastive_loss(out["image_features"], out["text_features"], out["logit_scale"])
    run.state.scaler.scale(loss).backward()
    return torch.stack((loss.detach(), out["logit_scale"].detach().float()))


def flush(run: Run, meter: Meter, *, show: bool) -> None:
    """Fetches the numbers of the pending steps in one transfer, averages the loss over ranks, writes and shows them."""
    numbers = torch.stack([n for _, n, _ in run.pending])
    if run.env.is_distributed:
        dist.all_reduce(numbers)
        numbers /= run.env.world_size
    rows = [row for row, *_ in run.pending]
    watched = [(row, rms) for row, _, rms in run.pending if rms is not None]
    run.pending.clear()
    if run.rms is not None and watched:
        for (row, _), values in zip(watched, torch.stack([rms for _, rms in watched]).tolist(), strict=True):
            row["rms"] = dict(zip(run.rms.names, values, strict=True))
    for row, (loss, logit_scale, norm) in zip(rows, numbers.tolist(), strict=True):
        row |= {"loss": loss, "logit_scale": logit_scale, "grad_norm": None if math.isnan(norm) else norm}
    if show:
        rows[-1] |= meter.interval()
    write(run, rows)
    if show:
        images_per_second = max(rows[-1]["images_per_second"], 1e-9)
        run.console.progress(rows[-1], steps=run.steps, seconds_per_step=run.batch_size / images_per_second)
    bad = next((row for row in rows if not math.isfinite(row["loss"])), None)
    if bad is not None:
        raise _gone_bad(run, f"the loss is {bad['loss']} at step {bad['step']}")


def require_finite_weights(run: Run) -> None:
    """Checks what is about to be saved: the loss of a step says nothing of the update that follows. Collective.

    Raises:
        NonFiniteError: on every rank, if a weight of any of them is NaN or infinite.
    """
    finite = torch.stack([p.isfinite().all() for p in run.state.model.parameters()]).all().int()
    if run.env.is_distributed:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite.item():
        raise _gone_bad(run, f"the weights are not finite after step {run.state.step}, which is not saved")


def _gone_bad(run: Run, what: str) -> NonFiniteError:
    path = run.checkpoints.newest()
    kept = f"the newest checkpoint, {path}, has finite weights" if path else "there is no checkpoint yet"
    return NonFiniteError(f"{what}: lower optim.lr, lengthen schedule.warmup or set optim.clip_norm; {kept}")


def owed(run: Run) -> list[Evaluator]:
    """Evaluators due at the state's step that did not finish after it was saved. Collective."""
    step = run.state.step
    if step == 0 or not due(step, run.eval_every, run.steps):
        return []
    done = gather_objects(evaluated(run.folder / "metrics.jsonl", step) if run.env.is_main else None)[0]
    return [e for e in run.evaluators if e.task not in done]


def evaluate(run: Run, evaluators: Sequence[Evaluator]) -> None:
    """Runs evaluators on every rank, writes what they found, and shows it."""
    for evaluator in evaluators:
        result = evaluator.run(run.encoder)
        if run.env.is_main:
            result.write_examples(run.folder / "examples", run.state.step)
        row = {
            "kind": "eval",
            "step": run.state.step,
            "samples": run.state.samples,
            "seconds": run.state.seconds,
            "task": result.task,
            "metrics": result.metrics,
        }
        write(run, [row])
        log.info("step %d: %s", run.state.step, result.summary())


def write(run: Run, rows: Sequence[Row]) -> None:
    for writer in run.writers:
        writer.write(rows)
