"""The training loop: the algorithm, top to bottom.

Shape suffixes: B pairs on this rank, C colours, H height, W width, L tokens of context, D features.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipq.dist.gather import gather_objects
from clipq.dist.stop import Stopped
from clipq.dist.watchdog import Place
from clipq.eval.common import Evaluator
from clipq.log.meters import Meter
from clipq.log.writers import evaluated
from clipq.optim.loss_scale import FixedLossScaler
from clipq.optim.shards import local
from clipq.train.accumulate import accumulate
from clipq.train.events import flush, measure_quantization, newest, rewind, tell_failed_saves
from clipq.train.guard import clip_gradients, gradient_norms, total_norm
from clipq.train.profile import profiler
from clipq.train.run import Pending, Run, diverged, numbers_of, write

log = logging.getLogger(__name__)


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the last, is done after this one."""
    return step == last or (every > 0 and step % every == 0)


def train(run: Run) -> None:
    """Trains from the state's step to the last.

    Raises:
        Stopped: a signal asked for it; what was trained is saved.
        DivergedError: the run went bad; no such weights were saved.
        CheckpointError: the last checkpoint could not be written.
        EvalError: an evaluator cannot use its data; the same command evaluates again.
    """
    meter = Meter(
        seconds=run.state.seconds,
        device=run.env.device,
        flops_per_image=run.flops_per_image,
        world_size=run.env.world_size,
    )
    try:
        run.stop.at_once = False
        run.stop.agree()
        train_on(run, meter)
    except Stopped as stopped:
        run.progress.enter(run.state.step + 1, Place.PAUSE)
        stopped.where = end(run, meter)
        raise
    finally:
        run.checkpoints.wait()  # what is being written is finished, however the run ends
        tell_failed_saves(run)
        if run.graph is not None:
            run.graph.forget()  # NCCL would wait for it at the end of the process group, for ever


def train_on(run: Run, meter: Meter) -> None:
    """The steps of `train`. Where a signal ends them, it is on all ranks after the same step."""
    state = run.state
    batches = run.loader(state.place)
    late = owed(run)
    if late:
        with paused(run, meter):
            evaluate(run, late)
    run.model.train()
    with profiler(run.profile, after=state.step, folder=run.folder, env=run.env) as profiling:
        while state.step < run.steps:
            run.progress.enter(state.step + 1, Place.DATA)
            run.stop.agree_late()
            with meter.waiting(), run.stop.breaks_off(allowed=not run.env.is_distributed):
                batch = next(batches)
            step = state.step + 1
            run.progress.enter(step, Place.STEP)
            state.place = batch["place"]
            run.pending.append(train_step(run, batch, run.schedule(step)))
            state.step, state.samples, state.seconds = step, state.samples + run.batch_size, meter.seconds()
            meter.count(run.batch_size)
            run.pending[-1].row |= {"samples": state.samples, "seconds": state.seconds}

            evaluating = bool(run.evaluators) and due(step, run.eval_every, run.steps)
            logging_now = due(step, run.log_every, run.steps)
            saving = step == run.steps or run.checkpoints.due(step, ask_clock=logging_now)
            # Numbers are read (and so checked) before anything is built on the weights that gave them.
            if (logging_now or evaluating or saving) and flush(run, meter, show=logging_now):
                with paused(run, meter):
                    batches.close()
                    rewind(run)
                    batches = run.loader(state.place)
                continue
            if run.quantization_every and step % run.quantization_every == 0:
                with paused(run, meter):
                    measure_quantization(run, batch)
            # Weights whose loss is refused may be bad themselves: saved again and again, they would drive out the good.
            if saving and (step == run.steps or not run.refused):
                with paused(run, meter):
                    save(run, wait=step == run.steps)
            if evaluating:  # after the save, so that a fault in an evaluation costs no training
                with paused(run, meter):
                    evaluate(run, run.evaluators)
            tell_failed_saves(run)
            if profiling is not None:
                profiling.step()


@contextmanager
def paused(run: Run, meter: Meter) -> Iterator[None]:
    """Around what is not training: neither the clock of the run nor the limit of a step holds."""
    run.progress.enter(run.state.step + 1, Place.PAUSE)
    with meter.paused():
        yield


def save(run: Run, *, wait: bool) -> None:
    require_finite_weights(run)
    run.checkpoints.save(run.state, loader=run.loader_info, wait=wait)


def end(run: Run, meter: Meter) -> str:
    """Saves a run between two steps, unless it is saved there, and says where it is. Collective."""
    state = run.state
    if state.step == 0:
        return "before its first step"
    path, learned = run.checkpoints.path(state.step), state.learned
    if run.pending and flush(run, meter, show=False):  # the resumed run will go back as this one would have
        return f"in step {state.step}, from which it is to go back to {newest(run)}"
    state.learned = learned  # as it is where the run goes on: numbers were not due to be read
    if newest(run) != path:
        save(run, wait=True)
    return f"after step {state.step}, saved in {path}"


def train_step(run: Run, batch: dict[str, Any], lr: float) -> Pending:
    """One optimizer step; does not wait for the device."""
    state, step = run.state, run.state.step + 1
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if run.graph is None or not run.graph.recorded:  # a recorded backward overwrites the gradients
        # Micro-batches add to them: in the memory that they have, or DDP would hold the sums beside its own buckets.
        # FSDP has no such buckets, and torch does not zero shards and whole tensors in one call.
        state.optimizer.zero_grad(set_to_none=run.accumulation == 1 or run.sharded is not None)
    run.watch.before_forward(step)
    run.statistics.keep()
    compute = functools.partial(forward_backward, run) if run.graph is None else run.graph
    numbers = compute(batch["image"], batch["text"]).clone()  # a recorded step writes the next ones to the same place
    if run.env.is_distributed:
        asked = torch.full_like(numbers[0], float(run.stop.asked is not None))
        loss_and_askers = torch.stack((numbers[0], asked))
        dist.all_reduce(loss_and_askers)
        numbers[0] = loss_and_askers[0] / run.env.world_size
        run.stop.hear(loss_and_askers[1])

    params = list(state.model.parameters())
    state.scaler.unscale_(state.optimizer)
    norms = gradient_norms(params)
    norm = total_norm(norms)
    if run.clip_norm is not None:
        clip_gradients(params, run.clip_norm, norm)
    bad = run.guard.judge(numbers[0], norm)
    watching = run.watch.due(step)
    if watching:
        run.watch.before_update()
    run.guard.update(state.optimizer, state.scaler, bad)
    run.statistics.put_back(bad)
    watched = run.watch.after_update(bad | ~norm.isfinite()) if watching else None
    state.scaler.update()
    if isinstance(state.scaler, FixedLossScaler) and state.scaler.left_out and not bad.item():
        left_out(run, state.scaler)
    with torch.no_grad():
        logit_scale: Any = state.model.logit_scale
        logit_scale.clamp_(0, math.log(run.max_logit_scale))
    row = {"kind": "train", "step": step, "lr": lr}
    numbers = torch.cat((numbers, torch.stack((norm, bad.float()))))
    return Pending(row, numbers, norms, watched, batch["key"], batch["lost"], batch["filtered"], batch["sources"])


def left_out(run: Run, scaler: FixedLossScaler) -> None:
    """Says which parameters a step left out, since their gradients overflowed."""
    step = run.state.step + 1
    write(run, [{"kind": "event", "step": step, "event": "gradient overflow", "parameters": scaler.left_out}])
    new = [name for name in scaler.left_out if scaler.in_a_row[name] == 1]
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        log.warning("step %d: gradient of %s%s not finite: left out of the step", step, new[0], more)


def forward_backward(run: Run, image_BCHW: Tensor, text_BL: Tensor) -> Tensor:
    """Gradients of a batch into the parameters; returns the first five of `COLUMNS`, of this rank's pairs."""
    if run.accumulation > 1:
        numbers = accumulate(run, image_BCHW, text_BL)
    else:
        outputs = run.forward(run.model, image_BCHW, text_BL)
        loss, largest = run.loss(*outputs)
        run.state.scaler.scale(loss).backward()
        numbers = numbers_of(loss, largest, *outputs)
    if run.sharded is not None:
        run.sharded.average_small()
    return numbers


def require_finite_weights(run: Run) -> None:
    """Checks what is about to be saved: the loss of a step says nothing of the update that follows. Collective.

    Raises:
        DivergedError: on every rank, if a weight of any of them is NaN or infinite.
    """
    held = [*map(local, run.state.model.parameters()), *run.statistics.buffers]
    finite = torch.stack([t.isfinite().all() for t in held]).all().int()
    if run.env.is_distributed:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite.item():
        raise diverged(run, f"the weights are not finite after step {run.state.step}, which is not saved")


def owed(run: Run) -> list[Evaluator]:
    """Evaluators due at the state's step that did not finish after it was saved. Collective."""
    step = run.state.step
    if step == 0 or not due(step, run.eval_every, run.steps):
        return []
    done = gather_objects(evaluated(run.folder / "metrics.jsonl", step) if run.env.is_main else None)[0]
    return [e for e in run.evaluators if e.task not in done]


def evaluate(run: Run, evaluators: Sequence[Evaluator]) -> None:
    """Runs evaluators on every rank, writes what they found, and shows it."""
    if run.graph is not None:
        run.graph.forget()  # an evaluation has as much memory as without a recording
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
