"""StableAdamW as two Triton kernels over all tensors, without a word from the GPU to the host.

Tensors are cut into chunks, a program for each. Where tensors lie, and which chunk is whose, is in tables on the GPU,
written anew when something has moved: gradients do, at each step that allocates them.

Traffic for float32: phase one reads g and u, phase two reads g, m, u and θ and writes m, u and θ: 36 bytes for each
element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipq.kernels.launch import launch
from clipq.kernels.stable_adamw import Hyper, Tensors
from clipq.kernels.stable_adamw.reference import least

CHUNK = 32768
"""Elements that a program works on."""
BLOCK = 2048
"""Elements that it holds at a time."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What parameters and gradients may be; the moments are float32."""
HYPERS = 11
"""Numbers in a row of the table of parameter groups: see `_row`."""


@triton.jit
def _at(address, TYPE, ALIGNED):
    """An address as a pointer, by constants; 16 bytes at a time where all tensors begin at a multiple of that."""
    if TYPE == 1:
        ptr = address.to(tl.pointer_type(tl.bfloat16))
    elif TYPE == 2:
        ptr = address.to(tl.pointer_type(tl.float16))
    else:
        ptr = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x of at most 0, to the last bits of float32 near 0 too."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(x > -0.5, -series, 1.0 - tl.exp(x))


@triton.jit
def _decays(hyper_ptr, t):
    """β2, 1 - β2, and what the moments of step t are to be divided by."""
    power = tl.load(hyper_ptr + 4)
    constant = power == 0.0
    x = -power * tl.log(t)
    beta2 = tl.where(constant, tl.load(hyper_ptr + 2), _one_minus_exp(x))
    new2 = tl.where(constant, tl.load(hyper_ptr + 3), tl.exp(x))
    correction1 = _one_minus_exp(t * tl.load(hyper_ptr + 5))
    return beta2, new2, correction1, tl.where(constant, _one_minus_exp(t * tl.load(hyper_ptr + 6)), 1.0)


@triton.jit
def _ratios(g_ptr, u_ptr, at, size, inverse, keep, add, least, MASKED):
    """g² / max(û, ε²) of a block, whose û is keep · u + add · g²."""
    if MASKED:
        g = tl.load(g_ptr + at, mask=at < size, other=0.0).to(tl.float32) * inverse
        u = tl.load(u_ptr + at, mask=at < size, other=1.0)
    else:  # without a mask, 16 bytes are loaded at a time
        g = tl.load(g_ptr + at).to(tl.float32) * inverse
        u = tl.load(u_ptr + at)
    squares = g * g
    return squares / tl.maximum(u * keep + squares * add, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _ratio_sums(
    pointers_ptr, chunks_ptr, hypers_ptr, current_ptr, sums_ptr, scale_ptr,
    n,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """Phase one: this chunk's Σ g² / max(û, ε²); and the number of this step, for phase two."""
    chunk = tl.program_id(0)
    i, start = tl.load(chunks_ptr + 4 * chunk), tl.multiple_of(tl.load(chunks_ptr + 4 * chunk + 1), 16)
    size, group = tl.load(chunks_ptr + 4 * chunk + 2), tl.load(chunks_ptr + 4 * chunk + 3)
    g_ptr = _at(tl.load(pointers_ptr + n + i), G_TYPE, ALIGNED) + start
    u_ptr = _at(tl.load(pointers_ptr + 3 * n + i), 0, ALIGNED) + start
    t = tl.load(tl.load(pointers_ptr + 4 * n + i).to(tl.pointer_type(tl.float32))) + 1.0
    if start == 0:
        tl.store(current_ptr + i, t)
    hyper_ptr = hypers_ptr + group * HYPERS
    beta2, new2, _, correction2 = _decays(hyper_ptr, t)
    keep, add, least = beta2 / correction2, new2 / correction2, tl.load(hyper_ptr + 8)
    inverse = 1.0
    if SCALED:
        inverse = 1.0 / tl.load(scale_ptr)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = size // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        total += _ratios(g_ptr, u_ptr, first + tl.arange(0, BLOCK), size, inverse, keep, add, least, False)
    total += _ratios(g_ptr, u_ptr, whole + tl.arange(0, BLOCK), size, inverse, keep, add, least, True)
    tl.store(sums_ptr + chunk, tl.sum(total, axis=0))


@triton.jit
def _add_chunks(sums_ptr, first_chunk_ptr, out_ptr):
    """The sum of a tensor's chunks, in a fixed order."""
    i = tl.program_id(0)
    tl.store(out_ptr + i, _total(sums_ptr, tl.load(first_chunk_ptr + i), tl.load(first_chunk_ptr + i + 1)))


@triton.jit
def _total(sums_ptr, begin, end):
    total = tl.zeros((256,), tl.float32)
    for first in range(begin, end, 256):
        at = first + tl.arange(0, 256)
        total += tl.load(sums_ptr + at, mask=at < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _update_block(
    p_ptr, g_ptr, m_ptr, u_ptr, at, size, inverse, beta2, new1, new2, inverse2, eps, decay, rate, MASKED
):  # fmt: skip
    if MASKED:
        mask = at < size
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32) * inverse
        m, u = tl.load(m_ptr + at, mask=mask, other=0.0), tl.load(u_ptr + at, mask=mask, other=0.0)
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(g_ptr + at).to(tl.float32) * inverse
        m, u, p = tl.load(m_ptr + at), tl.load(u_ptr + at), tl.load(p_ptr + at).to(tl.float32)
    m += (g - m) * new1
    u = u * beta2 + g * g * new2
    p = (p - (decay * p + rate * (m / (tl.sqrt(u * inverse2) + eps)))).to(p_ptr.dtype.element_ty)
    if MASKED:
        tl.store(m_ptr + at, m, mask=at < size)
        tl.store(u_ptr + at, u, mask=at < size)
        tl.store(p_ptr + at, p, mask=at < size)
    else:
        tl.store(m_ptr + at, m)
        tl.store(u_ptr + at, u)
        tl.store(p_ptr + at, p)


@triton.jit
def _update(
    pointers_ptr, chunks_ptr, first_chunk_ptr, numels_ptr, hypers_ptr, current_ptr, sums_ptr, rms_ptr,
    scale_ptr, found_inf_ptr,
    n,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr,
    CHUNKED: tl.constexpr, BLOCK: tl.constexpr, HYPERS: tl.constexpr,
):  # fmt: skip
    """Phase two. CHUNKED: the sums are those of chunks; otherwise those of tensors."""
    if CHECKED:  # noqa: SIM102  a constant, then a value of the GPU
        if tl.load(found_inf_ptr) != 0.0:
            return
    chunk = tl.program_id(0)
    i, start = tl.load(chunks_ptr + 4 * chunk), tl.multiple_of(tl.load(chunks_ptr + 4 * chunk + 1), 16)
    size, group = tl.load(chunks_ptr + 4 * chunk + 2), tl.load(chunks_ptr + 4 * chunk + 3)
    p_ptr = _at(tl.load(pointers_ptr + i), P_TYPE, ALIGNED) + start
    g_ptr = _at(tl.load(pointers_ptr + n + i), G_TYPE, ALIGNED) + start
    m_ptr = _at(tl.load(pointers_ptr + 2 * n + i), 0, ALIGNED) + start
    u_ptr = _at(tl.load(pointers_ptr + 3 * n + i), 0, ALIGNED) + start
    t = tl.load(current_ptr + i)
    hyper_ptr = hypers_ptr + group * HYPERS
    beta2, new2, correction1, correction2 = _decays(hyper_ptr, t)
    if CHUNKED:
        total = _total(sums_ptr, tl.load(first_chunk_ptr + i), tl.load(first_chunk_ptr + i + 1))
    else:
        total = tl.load(sums_ptr + i)
    rms = tl.sqrt(total / tl.load(numels_ptr + i))
    if start == 0:
        tl.store(rms_ptr + i, rms)
        tl.store(tl.load(pointers_ptr + 4 * n + i).to(tl.pointer_type(tl.float32)), t)
    threshold = tl.load(hyper_ptr + 9)
    # infinity over infinity is no reason to lose a tensor that is not to be clipped
    excess = tl.where(threshold == float("inf"), 0.0, rms / threshold)
    lr = tl.load(hyper_ptr) / tl.where(excess <= 1.0, 1.0, excess)
    decay, rate, eps = lr * tl.load(hyper_ptr + 10), lr / correction1, tl.load(hyper_ptr + 7)
    new1, inverse2 = tl.load(hyper_ptr + 1), 1.0 / correction2
    inverse = 1.0
    if SCALED:
        inverse = 1.0 / tl.load(scale_ptr)
    whole = size // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        at = first + tl.arange(0, BLOCK)
        _update_block(
            p_ptr, g_ptr, m_ptr, u_ptr, at, size, inverse, beta2, new1, new2, inverse2, eps, decay, rate, False
        )
    at = whole + tl.arange(0, BLOCK)
    _update_block(p_ptr, g_ptr, m_ptr, u_ptr, at, size, inverse, beta2, new1, new2, inverse2, eps, decay, rate, True)


def _row(hyper: Hyper) -> list[float]:
    log1, log2 = (math.log(beta) if beta else -math.inf for beta in (hyper.beta1, hyper.beta2))
    lr = hyper.lr
    if isinstance(lr, Tensor):  # one on the GPU is copied into the table there
        lr = 0.0 if lr.is_cuda else lr.item()
    return [
        *(lr, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.beta2_power or 0.0, log1, log2, hyper.eps),
        *(least(hyper.eps, torch.float32), hyper.clip_threshold, hyper.weight_decay),
    ]


def _upload(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values on the GPU without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host
    pinned = host.pin_memory()
    table: Any = pinned.to(device, non_blocking=True)
    table.pinned = pinned  # where this is recorded in a CUDA graph, each replay copies from it again
    return table


class _Set:
    """Tensors of the same types and alignment, for which one binary serves, and their tables."""

    def __init__(self, tensors: Tensors, indices: list[int]) -> None:
        self.indices, self.count = indices, len(indices)
        device = tensors.params[indices[0]].device
        self.places = _upload(indices, torch.int64, device)
        chunks, first_chunk = [], [0]
        for place, i in enumerate(indices):
            size = tensors.params[i].numel()
            for start in range(0, max(1, size), CHUNK):
                chunks += [place, start, min(CHUNK, size - start), tensors.groups[i]]
            first_chunk.append(len(chunks) // 4)
        self.programs = first_chunk[-1]
        self.chunks = _upload(chunks, torch.int64, device)
        self.first_chunk = _upload(first_chunk, torch.int32, device)
        self.numels = _upload([max(1, tensors.numels[i]) for i in indices], torch.float32, device)
        self.current, self.rms = (torch.zeros(self.count, device=device) for _ in range(2))
        self.sums = torch.zeros(self.programs, device=device)
        self._addresses: list[int] = []
        self._pointers = self.chunks

    def pointers(self, addresses: list[list[int]]) -> Tensor:
        """[5, tensors] int64: addresses of θ, g, m, u and the step."""
        own = [of_all[i] for of_all in addresses for i in self.indices]
        if own != self._addresses:
            self._addresses, self._pointers = own, _upload(own, torch.int64, self.chunks.device)
        return self._pointers


def _sets(tensors: Tensors, addresses: list[list[int]]) -> list[tuple[dict[str, Any], _Set]]:
    """Every set with the constants of its kernels; kept while the tensors are of the same kinds."""
    kinds = [
        (TYPES[p.dtype], TYPES[g.dtype], (p_at | g_at | m_at | u_at) % 16 == 0)
        for p, g, p_at, g_at, m_at, u_at in zip(tensors.params, tensors.grads, *addresses[:4], strict=True)
    ]
    key = (*kinds, *(p.numel() for p in tensors.params), *tensors.numels, *tensors.groups)
    if tensors.cache.get("key") != key:
        tensors.cache["key"] = key
        tensors.cache["sets"] = [
            (
                {"P_TYPE": kind[0], "G_TYPE": kind[1], "ALIGNED": kind[2]},
                _Set(tensors, [i for i, own in enumerate(kinds) if own == kind]),
            )
            for kind in dict.fromkeys(kinds)
        ]
    return tensors.cache["sets"]


def _hypers(tensors: Tensors) -> Tensor:
    """[groups · HYPERS] float32 on the parameters' device."""
    rows = [_row(hyper) for hyper in tensors.hypers]
    if tensors.cache.get("rows") != rows:
        flat = [value for row in rows for value in row]
        tensors.cache["rows"], tensors.cache["hypers"] = rows, _upload(flat, torch.float32, tensors.params[0].device)
    table: Tensor = tensors.cache["hypers"]
    for group, hyper in enumerate(tensors.hypers):
        if isinstance(hyper.lr, Tensor) and hyper.lr.is_cuda:
            table[group * HYPERS].copy_(hyper.lr)
    return table


def step(tensors: Tensors, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """As in `reference`. Parameters must be dense, moments laid out as they are, steps on their device."""
    grads = [
        g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for p, g in zip(tensors.params, tensors.grads, strict=True)
    ]
    lists = (tensors.params, grads, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps)
    addresses = [[t.data_ptr() for t in own] for own in lists]
    sets, hypers = _sets(tensors, addresses), _hypers(tensors)
    pointers = [own.pointers(addresses) for _, own in sets]
    device = tensors.params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A recorded step reads these tables whenever it is replayed, also after others have taken their place here.
        tensors.cache.setdefault("recorded", []).append((sets, pointers, hypers))
    unused = hypers  # a pointer for what a kernel does not read
    scale = unused if tensors.grad_scale is None else tensors.grad_scale
    found_inf = unused if tensors.found_inf is None else tensors.found_inf
    rms = torch.zeros(len(tensors.params), device=device) if len(sets) > 1 or reduce else None
    sums = None if reduce is None else torch.zeros(len(tensors.params), device=device)
    scaled, end = {"SCALED": tensors.grad_scale is not None}, {"BLOCK": BLOCK, "HYPERS": HYPERS}
    for (constants, own), table in zip(sets, pointers, strict=True):
        launch(
            *(_ratio_sums, (own.programs,), table, own.chunks, hypers, own.current, own.sums, scale),
            own.count,
            constants=constants | scaled | end,
            warps=8,
        )
        if sums is not None:
            part = torch.empty(own.count, device=device)
            launch(_add_chunks, (own.count,), own.sums, own.first_chunk, part, constants={})
            sums[own.places] = part
    if reduce is not None and sums is not None:
        sums = reduce(sums)
    for (constants, own), table in zip(sets, pointers, strict=True):
        launch(
            *(_update, (own.programs,), table, own.chunks, own.first_chunk, own.numels, hypers),
            *(own.current, own.sums if sums is None else sums[own.places], own.rms, scale, found_inf, own.count),
            constants=constants | scaled | {"CHECKED": tensors.found_inf is not None, "CHUNKED": sums is None} | end,
            warps=8,
        )
        if rms is not None:
            rms[own.places] = own.rms
    return sets[0][1].rms if rms is None else rms
