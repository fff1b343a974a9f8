"""A step in micro-batches whose loss is that of the whole batch: the memory of one, the contrast of all ranks' pairs.

Gradients of micro-batches cannot simply be added: each would be contrasted with itself alone. As in GradCache (Gao et
al., arXiv 2101.06983), all go through the model without keeping anything but their features; the loss of all features
of all ranks has a gradient for each of them; and each micro-batch goes through the model once more, with the random
numbers of its first time, and takes its features' gradients back. The last needs no second time: what it keeps, which
is what any of them keeps, stays for the loss, so that n micro-batches cost 2n - 1 forwards.

Shape suffixes: B pairs on this rank, C colours, H height, W width, L tokens of context, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from clipq.lowp import quantized_once
from clipq.train.guard import Statistics
from clipq.train.run import Run, numbers_of


def accumulate(run: Run, image_BCHW: Tensor, text_BL: Tensor) -> Tensor:
    """Does what `clipq.train.loop.forward_backward` does, in `run.accumulation` micro-batches; B is a multiple of it.

    Gradients, under a loss scaler too, are those of the whole batch but for the order of sums. Low-precision weights
    are quantized once. Batch norm takes its statistics over a micro-batch, as over a rank's part without accumulation.
    """
    images, texts = image_BCHW.chunk(run.accumulation), text_BL.chunk(run.accumulation)
    *others, last = zip(images, texts, strict=True)
    with quantized_once(run.state.model):
        states, features = _features(run, others)
        with unsynchronized(run.model):
            run.watch.micro_batch(len(others))
            outputs = run.forward(run.model, *last)
            run.watch.after_forward()
            numbers, gradients, of_scale = _gradients(run, [*features, outputs])
            torch.autograd.backward(outputs[:2], gradients.pop())
        for n, (micro_batch, state, gradient) in enumerate(zip(others, states, gradients, strict=True)):
            synchronizes = n == len(others) - 1
            with nullcontext() if synchronizes else unsynchronized(run.model):
                with _replayed(state, run.env.device):
                    outputs = run.forward(run.model, *micro_batch)
                # DDP waits for every parameter in the backward that synchronizes, so logit scale and bias belong there
                taken = len(outputs) if synchronizes else 2
                torch.autograd.backward(outputs[:taken], [*gradient, *of_scale][:taken])
    return numbers


def _features(
    run: Run, micro_batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The generators' states before each micro-batch, and its features of images and of texts, without a graph."""
    states, features = [], []
    with torch.no_grad(), _kept_statistics(run.state.model):
        for n, micro_batch in enumerate(micro_batches):
            run.watch.micro_batch(n)
            states.append(_generators(run.env.device))
            # not through DDP, which would take this for a step's first forward, and send buffers
            features.append(run.forward(run.state.model, *micro_batch)[:2])
    return states, features


def _gradients(run: Run, parts: list[list[Tensor]]) -> tuple[Tensor, list[tuple[Tensor, ...]], list[Tensor]]:
    """The loss over the features of all micro-batches.

    Args:
        parts: features of images and of texts of each micro-batch; of the last one, all that the loss takes.

    Returns:
        Numbers of the step, as of `numbers_of`; gradients of images' and texts' features for each micro-batch; those
        of logit scale and, if the model has one, logit bias.
    """
    with torch.no_grad():
        image_BD, text_BD = (torch.cat([part[i] for part in parts]) for i in range(2))
    inputs = [x.detach().requires_grad_() for x in (image_BD, text_BD, *parts[-1][2:])]
    loss, largest = run.loss(*inputs)
    image_grad_BD, text_grad_BD, *rest = torch.autograd.grad(run.state.scaler.scale(loss), inputs)
    split = zip(image_grad_BD.chunk(len(parts)), text_grad_BD.chunk(len(parts)), strict=True)
    return numbers_of(loss, largest, *inputs), list(split), rest


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Gradients of the forwards and backwards inside stay on this rank; the next ones outside add and send them all.

    FSDP2 then holds them whole, not its shard of them, from one micro-batch to the next.
    """
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


@contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms come out with the running statistics that they came in with: the second forward counts."""
    statistics = Statistics(model)
    statistics.keep()
    yield
    statistics.put_back()


def _generators(device: torch.device) -> list[Tensor]:
    """States of the generators that a forward draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draws are those that followed these states; afterwards the generators go on from where they are now."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
