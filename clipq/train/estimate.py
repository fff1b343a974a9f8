"""What a training step should take in memory and time, from the shapes of a model, without a GPU.

Memory: what a backward needs of each block follows from the block's widths, its recipe and what the compiler keeps, as
seen in its graphs; what lies outside of clipq's blocks is read off a forward in which nothing is computed. The blocks
are then gone through backwards: activations go as gradients come, so that the peak is less than the sum of all parts.

Time: operations, at the share of the GPU's peak that measured steps reached.

tests/unit/train/test_estimate.py holds both against docs/benchmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clipq.loss.tiles import TILE
from clipq.lowp.linear import LowpLinear
from clipq.lowp.recipe import Saved
from clipq.model.block import Block
from clipq.model.surgery import blocks

FP32 = 4


@dataclass(frozen=True)
class Layout:
    """How the processes share a model and a batch."""

    pairs: int
    """Of this process, in a step."""
    world_size: int = 1
    accumulation: int = 1
    buckets: bool = False
    """DDP keeps the memory of all gradients from step to step."""
    shards: int = 1
    """Parts that the matrices are cut into."""
    sharded: bool = False
    """FSDP2 is around the model, be it in one part."""
    reshard: bool = True
    """A block's matrices, gathered for its forward, are freed after it."""

    @property
    def micro_batch(self) -> int:
        return self.pairs // self.accumulation


@dataclass(frozen=True)
class Unit:
    """A block, or what lies between two of them; in bytes."""

    saved: int
    """From its forward to its backward."""
    work: int
    """More, while its backward runs."""
    gradients: int = 0
    """That its backward leaves."""


class Memory(NamedTuple):
    """Bytes of a GPU when it holds most. The parts are those of that moment, and `peak` is their sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def peak(self) -> int:
        return sum(self)


# --- what a backward needs ------------------------------------------------------------------------------------------


def units(
    model: nn.Module,
    image_size: tuple[int, int],
    context_length: int,
    layout: Layout,
    *,
    autocast: torch.dtype | None,
    checkpointing: bool,
) -> list[Unit]:
    """The parts of a model in the order of its forward, for one micro-batch.

    Args:
        model: on any device, `meta` too; with its low-precision layers, before it is wrapped or compiled.
        autocast: the type of the towers' arithmetic; None for fp32.
        checkpointing: blocks keep their input alone. Towers with blocks of their own are counted as without.
    """
    found: list[Unit] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        own = {
            n: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad) for n, p in model.named_parameters()
        }
        own |= {n: torch.empty(b.shape, dtype=b.dtype) for n, b in model.named_buffers()}
        images = torch.empty(layout.micro_batch, 3, *image_size)
        texts = torch.zeros(layout.micro_batch, context_length, dtype=torch.long)
        ledger = _Ledger(own.values())

        def instead(block: Block, x_BLD: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(ledger.unit())
            found.append(_block(block, x_BLD, layout, autocast, checkpointing))
            return x_BLD + 0.0  # saves nothing

        training = model.training
        model.train()
        cast = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
        with _forwards_replaced(model, instead), cast, ledger:
            torch.func.functional_call(model, own, (images, texts))
        model.train(training)
    found.append(ledger.unit())
    inside = sum(unit.gradients for unit in found)
    return [replace(found[0], gradients=_bytes(model, trained=True) - inside), *found[1:]]


def _bytes(model: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


class _Ledger:
    """Notes what autograd keeps, each piece of memory once; parameters do not count."""

    def __init__(self, known: Any) -> None:
        self._seen = {self._place(t): t for t in known}  # held, so that no other tensor comes to lie in their place
        self._sizes: list[int] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda t: t)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    @staticmethod
    def _place(t: Tensor) -> int:
        return t.untyped_storage()._cdata

    def _note(self, t: Tensor) -> Tensor:
        if self._place(t) not in self._seen:
            self._seen[self._place(t)] = t
            self._sizes.append(t.untyped_storage().nbytes())
        return t

    def unit(self) -> Unit:
        """What was noted since the last call. Its backward makes gradients of the size of the largest piece."""
        sizes, self._sizes = self._sizes, []
        return Unit(sum(sizes), 2 * max(sizes, default=0))


@contextmanager
def _forwards_replaced(model: nn.Module, function: Any) -> Iterator[None]:
    every = [block for _, block in blocks(model)]
    before = [block.__dict__.get("forward") for block in every]
    for block in every:
        block.forward = functools.partial(function, block)
    try:
        yield
    finally:
        for block, forward in zip(every, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _block(block: Block, x_BLD: Tensor, layout: Layout, autocast: torch.dtype | None, checkpointing: bool) -> Unit:
    """A compiled block."""
    D, H = block.attn.in_proj.in_features, block.mlp.c_fc.out_features
    tokens, r = x_BLD.numel() // D, x_BLD.element_size()
    c = FP32 if autocast is None else autocast.itemsize
    lowp, fused = isinstance(block.mlp.c_fc, LowpLinear), block.fused is not None
    residual = r if fused else c  # of the second norm: the sum itself, or the branch, of which it is made again
    kept = (
        r * D  # the input
        + _kept(block.attn.in_proj, c, fused) * D
        + 4 * c * D  # queries, keys, values and what attention makes of them
        + residual * D
        + _kept(block.mlp.c_fc, c, fused) * D
        + c * H  # before the activation
        + _kept(block.mlp.c_proj, c, fused) * H
        + _of_extras(block, c)
        + FP32 * (4 + block.attn.heads)  # mean and deviation of two norms; attention's sums
    )
    weights = sum(block.get_submodule(name).weight.numel() for name in block.linears())  # pyright: ignore
    # The weights as they are multiplied with. FSDP gathers them in 16 bits, so that there is no copy.
    copies = weights if lowp else 0 if autocast is None or layout.sharded else weights * c
    gradients = sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
    gathered = gradients if layout.sharded else 0  # whole before they are cut into shards
    saved = tokens * kept + copies
    recomputed = c * H if fused and _kept(block.mlp.c_proj, c, fused) == 0 else 0
    work = tokens * (2 * c * H + (r + c) * D + recomputed) + gathered + FP32 * D * H
    if checkpointing:
        return Unit(tokens * r * D, work + saved - tokens * r * D, gradients)
    return Unit(saved, work, gradients)


def _kept(layer: nn.Linear, c: int, fused: bool) -> int:
    """Bytes that are kept of each number that a norm or an activation hands to a layer."""
    saved = layer.recipe.saved if isinstance(layer, LowpLinear) else Saved.input
    if saved is Saved.quantized:
        return 1
    return 0 if saved is Saved.recomputed and fused else c


def _of_extras(block: Block, c: int) -> int:
    """Bytes for each token of what plain blocks do not have: norms inside, gains."""
    D, H = block.attn.in_proj.in_features, block.mlp.c_fc.out_features
    there = {
        "attn.ln_q": D,
        "attn.ln_k": D,
        "attn.ln_inner": D,
        "ln_attn": D,
        "ls_1": D,
        "ls_2": D,
        "mlp.ln": H,
    }
    found = sum(width for name, width in there.items() if not isinstance(block.get_submodule(name), nn.Identity))
    return c * (found + (D if block.attn.head_scale is not None else 0))


def loss_bytes(pairs: int, all_pairs: int, width: int) -> int:
    """What the loss takes beside the features and their gradients: four tiles and what runs along rows and columns;
    and the texts of all processes, gathered."""
    tile = FP32 * min(TILE, pairs * all_pairs)
    own, every = FP32 * pairs * width, FP32 * all_pairs * width
    return max(4 * tile + own + every, 2 * own + 2 * every) + (every if all_pairs > pairs else 0)


# --- the peak -------------------------------------------------------------------------------------------------------


def memory(model: nn.Module, parts: list[Unit], layout: Layout, *, inputs: int, loss: int, gathered: int) -> Memory:
    """What a GPU holds when it holds most, by torch's own count: the CUDA context, NCCL and what torch reserves and
    does not use come on top. An evaluation and a checkpoint are not in it.

    Args:
        parts: of `units`.
        inputs: bytes of this process's batch.
        loss: as of `loss_bytes`.
        gathered: bytes of each number of a block's matrices as FSDP keeps it whole.
    """
    weights, whole = _weights(model, layout, gathered)
    if layout.accumulation > 1:  # quantized once for all micro-batches; what the backward takes is among `parts`
        whole += sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, LowpLinear))
    all_gradients = _sharded(model, layout, trained=True)
    optimizer = 2 * all_gradients
    held = _held_gradients(model, layout)
    live = list(accumulate(unit.saved for unit in parts))
    cut = layout.shards if layout.sharded else 1
    done = [sum(unit.gradients for unit in parts[n + 1 :]) // cut for n in range(len(parts))]
    moments = [
        Memory(weights + whole, held or gradients, optimizer, inputs + saved + unit.work, 0)
        for unit, saved, gradients in zip(parts, live, done, strict=True)
    ]
    moments.append(Memory(weights + whole, held, optimizer, inputs + live[-1], loss))
    moments.append(Memory(weights, all_gradients, optimizer, inputs, 0))  # the optimizer's step
    if layout.sharded:  # each process builds the whole model before it is cut
        moments.append(Memory(_bytes(model), 0, 0, 0, 0))
    return max(moments, key=lambda moment: moment.peak)


def _sharded(model: nn.Module, layout: Layout, *, trained: bool = False) -> int:
    """Bytes of this process's parameters, or of the gradients that its optimizer sees."""
    return sum(
        p.numel() * p.element_size() // (layout.shards if layout.sharded and p.ndim >= 2 else 1)
        for p in model.parameters()
        if p.requires_grad or not trained
    )


def _matrices(model: nn.Module) -> tuple[list[int], int]:
    """Numbers in the matrices of each block, and in all others."""
    inside = [sum(p.numel() for p in block.parameters() if p.ndim >= 2) for _, block in blocks(model)]
    return inside, sum(p.numel() for p in model.parameters() if p.ndim >= 2) - sum(inside)


def _weights(model: nn.Module, layout: Layout, gathered: int) -> tuple[int, int]:
    """Bytes of this process's weights, and of those of others that it has while it computes."""
    if not layout.sharded:
        return _bytes(model), 0
    inside, rest = _matrices(model)
    # the rest is whole from forward to backward; of the blocks one is, and the next is on its way
    of_blocks = 2 * max(inside, default=0) if layout.reshard else sum(inside)
    return _sharded(model, layout), FP32 * rest + gathered * of_blocks


def _held_gradients(model: nn.Module, layout: Layout) -> int:
    """Bytes of gradients that are there throughout a step; 0 where they come with the backward."""
    if layout.sharded:  # whole from micro-batch to micro-batch
        return FP32 * sum(p.numel() for p in model.parameters() if p.requires_grad) if layout.accumulation > 1 else 0
    return _bytes(model, trained=True) if layout.buckets or layout.accumulation > 1 else 0


# --- time -----------------------------------------------------------------------------------------------------------

WIDTHS = (384, 768, 1024, 1280)
"""Of the widest blocks of the models that were measured: ViT-S/8, -B/16, -L/14 and -H/14 on an H100, whose recorded
steps reached these shares of its 16-bit peak (docs/benchmarks), the optimizer's part included."""
IN_16_BITS = (0.220, 0.310, 0.397, 0.419)
IN_8_BITS = (0.220, 0.350, 0.472, 0.510)
"""Of the same peak, by SwitchBack's recipes. The first was not measured: as in 16 bits."""
MEASURED = ("bf16", "switchback", "switchback_r", "switchback_m", "switchback_fp8")
"""Recipes whose steps were."""
OF_LOSS = 0.040
"""The share that the fp32 products of the loss reach."""


def widest(model: nn.Module) -> int:
    """Width of the widest blocks, 0 where none are clipq's."""
    return max((block.attn.in_proj.in_features for _, block in blocks(model)), default=0)


def utilization(model: nn.Module, recipe: str) -> float:
    """The share of the 16-bit peak that steps of a model with clipq's blocks reach; wider blocks reach more."""
    return float(np.interp(widest(model), WIDTHS, IN_16_BITS if recipe == "bf16" else IN_8_BITS))


def step_seconds(
    flops: float, layout: Layout, *, peak: float, utilization: float, checkpointing: bool, features: int
) -> float:
    """Seconds of a step whose launches cost nothing, nor what is sent.

    Args:
        flops: of a pair, forward and backward.
        peak: operations a second of a GPU in 16 bits.
        features: numbers in a feature.
    """
    forwards = (layout.accumulation - 1) / layout.accumulation + checkpointing  # once more; a third of the operations
    loss = 4 * 2 * layout.pairs**2 * layout.world_size * features
    return (flops * layout.pairs * (1 + forwards / 3) / utilization + loss / OF_LOSS) / peak
