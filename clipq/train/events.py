"""Reads what steps left on the device: metrics, spikes, and what the guard does about bad steps."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipq.config.choices import GuardPolicy
from clipq.dist.gather import gather_objects, raised_on_every_rank
from clipq.log.meters import Meter
from clipq.log.writers import Row
from clipq.optim.loss_scale import FixedLossScaler
from clipq.train.checkpoint import load, set_aside_damaged
from clipq.train.run import COLUMNS, Pending, Run, diverged, write
from clipq.watch.quantization import PAIRS, quantization_errors
from clipq.watch.spikes import row_of

log = logging.getLogger(__name__)

MAX_OVERFLOWS = 100
"""Steps in a row that may leave a parameter out, under a fixed loss scale, or all of them, under a dynamic one."""


def flush(run: Run, meter: Meter, *, show: bool) -> bool:
    """Fetches the numbers of the pending steps in one transfer, writes and shows them, and looks at them.

    Returns:
        Whether the run is to go back to its newest checkpoint.

    Raises:
        DivergedError: a step was bad, and by its policy the guard ends the run; or a parameter overflows without end.
    """
    pending = run.pending.copy()
    run.pending.clear()
    numbers = torch.stack([p.numbers for p in pending])
    counts = [[p.lost, *p.filtered.values(), *p.sources.values()] for p in pending]
    counts = torch.tensor(counts, device=numbers.device)
    if run.env.is_distributed:
        dist.all_reduce(counts)
        for columns, how in (([2], dist.ReduceOp.MAX), ([3, 4], dist.ReduceOp.MIN)):  # loss and norm are the whole's
            part = numbers[:, columns]
            dist.all_reduce(part, how)
            numbers[:, columns] = part
    watched = [p for p in pending if p.watched is not None]
    if watched:
        shown = torch.stack([p.watched for p in watched])  # pyright: ignore[reportArgumentType, reportCallIssue]
        if run.env.is_distributed:  # magnitudes are of a rank's own pairs: their mean, and NaN where one has it
            dist.all_reduce(shown)
            shown /= run.env.world_size
        for p, values in zip(watched, shown.tolist(), strict=True):
            p.row |= run.watch.row(values)
    events: list[Row] = []
    bad: list[Row] = []
    run.refused = False
    for p, values, (lost, *of_batch) in zip(pending, numbers.tolist(), counts.tolist(), strict=True):
        if lost:
            p.row["lost"] = lost
        if p.sources:
            p.row["sources"] = dict(zip(p.sources, of_batch[len(p.filtered) :], strict=True))
        filtered = {reason: count for reason, count in zip(p.filtered, of_batch, strict=False) if count}
        if filtered:
            p.row["filtered"] = filtered
        run.filtered.add(filtered, run.batch_size)
        named: dict[str, float] = dict(zip(COLUMNS, values, strict=True))
        p.row |= {name: named[name] for name in ("loss", "logit_scale", "max_logit", "grad_norm")}
        run.refused = bool(named["bad"])
        if run.refused:  # nothing is learned of a loss that is not trained on
            bad.append(bad_step(run, p, named))
            continue
        events += [row_of(e) for e in run.state.spikes.update(p.row["step"], named["loss"], p.row.get("rms", {}))]
        if (overflow := overflowed(run, p, named["grad_norm"])) is not None:
            events.append(overflow)
    if show:
        speed = meter.interval()
        pending[-1].row |= speed | run.stragglers.look(run.env, speed["data_wait"] or 0.0)
    write(run, [p.row for p in pending] + events + bad)
    if show:
        last = pending[-1].row
        seconds = run.batch_size / max(last["images_per_second"], 1e-9)
        run.console.progress(last, steps=run.steps, seconds_per_step=seconds)
        if news := run.filtered.news():
            log.info("%s", news)
    for event in events + bad:
        log.warning("step %d: %s", event["step"], describe(event))
    require_trained(run)
    again = bool(bad) and step_in(run, bad)
    run.state.learned = run.state.spikes.mean
    run.guard.learn(run.state.learned)
    return again


def overflowed(run: Run, pending: Pending, norm: float) -> Row | None:
    """The event of a step that a dynamic loss scale left out, and counts those in a row."""
    scaler = run.state.scaler
    if not isinstance(scaler, torch.amp.GradScaler) or not scaler.is_enabled() or math.isfinite(norm):
        run.overflows = 0
        return None
    run.overflows += 1
    names = [n for n, finite in zip(run.guard.names, pending.norms.isfinite().tolist(), strict=True) if not finite]
    return {"kind": "event", "step": pending.row["step"], "event": "gradient overflow", "parameters": names}


def require_trained(run: Run) -> None:
    """Checks that a loss scale does not leave steps, or the same parameter, out step after step.

    Raises:
        DivergedError: it does.
    """
    scaler = run.state.scaler
    if run.overflows >= MAX_OVERFLOWS:
        raise diverged(
            run,
            f"gradients were not finite in each of the last {run.overflows} steps, to step {run.state.step}, whatever "
            "the loss scale: nothing is trained",
        )
    if not isinstance(scaler, FixedLossScaler) or not scaler.in_a_row:
        return
    name, steps = max(scaler.in_a_row.items(), key=lambda item: item[1])
    if steps >= MAX_OVERFLOWS:
        raise diverged(
            run,
            f"{name} is not trained: its gradient was not finite in each of the last {steps} steps, to step "
            f"{run.state.step}; backend.loss_scale={scaler.get_scale():g} may be too large",
        )


def describe(event: Row) -> str:
    """An event in words."""
    if event["event"] == "loss spike":
        leads = ", ".join(f"{name} {lead} steps before" for name, lead in event["leads"].items())
        before = f"; RMS_t was high in {leads}" if leads else ""
        return f"loss spike: {event['loss']:.3f}, running mean {event['mean']:.3f}{before}"
    if event["event"] == "rms event":
        return f"RMS_t of {event['parameter']} is {event['rms']:.1f}: its second moment is out of date"
    if event["event"] == "gradient overflow":
        return f"gradients of {len(event['parameters'])} parameters overflow at this loss scale: no update was made"
    first = f", first in {event['tensor']}" if event["tensor"] else ""
    return f"{event['reason']}{first}: no update was made; its samples are in {event['keys']}"


def bad_step(run: Run, pending: Pending, numbers: dict[str, float]) -> Row:
    """The event of a step that the guard refused; the keys of its batch go into a file. Collective."""
    step = pending.row["step"]
    reason, first = run.guard.reason(numbers["loss"], pending.norms)
    forward = {name: value for name, value in pending.row.get("features", {}).items() if not math.isfinite(value)}
    forward |= {f"{tower}_features": 0 for tower in ("image", "text") if not numbers[f"{tower}_finite"]}
    if not math.isfinite(numbers["logit_scale"]):
        forward = {"logit_scale": 0} | forward
    keys = gather_objects(pending.keys)
    text = "".join(f"{key}\n" for part in keys for key in part)
    path = gather_objects(_written(run.folder / "bad_batches", step, text) if run.env.is_main else None)[0]
    return {
        "kind": "event",
        "step": step,
        "event": "bad step",
        "reason": reason,
        "tensor": next(iter(forward), first),
        "keys": str(path.relative_to(run.folder)),
    }


def _written(folder: Path, step: int, text: str) -> Path:
    """A file of these names: after a rewind another batch may have gone bad at the same step."""
    folder.mkdir(exist_ok=True)
    data = text.encode("utf-8", "backslashreplace")
    for number in itertools.count(1):
        path = folder / (f"step_{step:08d}.txt" if number == 1 else f"step_{step:08d}_{number}.txt")
        if not path.exists() or path.read_bytes() == data:
            break
    path.write_bytes(data)
    return path


def step_in(run: Run, bad: list[Row]) -> bool:
    """What the guard's policy does about bad steps, given their events: whether the run goes back.

    Raises:
        DivergedError: it is to stop, its limit is reached, or there is nothing to go back to.
    """
    guard, event = run.guard, bad[0]
    guard.stepped_in += 1 if guard.policy is GuardPolicy.rewind else len(bad)
    first = f", first in {event['tensor']}," if event["tensor"] else ""
    what = f"{event['reason']}{first} at step {event['step']} (its samples: {run.folder / event['keys']})"
    if guard.policy is GuardPolicy.stop:
        raise diverged(run, what)
    if guard.stepped_in >= guard.limit:
        what = f"{what}, and that is as often as guard.limit={guard.limit} allows"
        raise diverged(run, what, mend="or raise guard.limit")
    if guard.policy is GuardPolicy.rewind and newest(run) is None:
        what = f"{what}, and guard.policy=rewind has nothing to go back to"
        raise diverged(run, what, mend="lower checkpoint.every, or choose guard.policy=skip")
    return guard.policy is GuardPolicy.rewind


def newest(run: Run) -> Path | None:
    """The newest checkpoint as rank 0 sees it: other machines may see the folder as it was. Collective."""
    return gather_objects(run.checkpoints.newest())[0]


def tell_failed_saves(run: Run) -> None:
    """Writes an event for each checkpoint that could not be written, or uploaded; on rank 0, which alone knows."""
    for step, error in run.checkpoints.failures():
        write(run, [{"kind": "event", "step": step, "event": "failed save", "reason": str(error)}])
    uploads = run.checkpoints.uploads
    if uploads is not None and (failed := uploads.poll()) is not None:
        step, reason = failed
        log.warning("%s; training goes on, and the next checkpoint is uploaded as usual", reason)
        write(run, [{"kind": "event", "step": step, "event": "failed upload", "reason": reason}])


def rewind(run: Run) -> None:
    """Takes the newest checkpoint that is as it was written, with the place in the data as it is now. Collective.

    Raises:
        ValueError: on every rank, if there is none.
    """
    newest(run)  # waits for one that is being written
    with raised_on_every_rank(ValueError):
        for line in set_aside_damaged(run.checkpoints.folder) if run.env.is_main else []:
            log.warning("%s", line)
    state, path = run.state, newest(run)
    assert path is not None
    step, place = state.step, state.place
    with raised_on_every_rank(ValueError):
        load(path, state, run.env)
    state.place = place
    run.guard.learn(state.learned)
    write(run, [{"kind": "event", "step": step, "event": "rewind", "to": state.step}])
    log.warning("went back from step %d to %s; the batches since are left out", step, path)


def measure_quantization(run: Run, batch: dict[str, Any]) -> None:
    """Writes the error of every layer in low precision."""
    device = run.env.device
    image, text = (batch[name][:PAIRS].to(device) for name in ("image", "text"))
    with torch.autocast(device.type, dtype=run.autocast or torch.bfloat16, enabled=run.autocast is not None):
        errors = quantization_errors(run.state.model, run.normalize(image), text)
    if errors:
        write(run, [{"kind": "quantization", "step": run.state.step, "errors": errors}])
