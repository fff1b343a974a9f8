"""A model in shards over processes, by torch's FSDP2 (`fully_shard`).

What has two dimensions and more is sharded: it is nearly all of a model. What has fewer (gains, biases, the logit
scale) stays whole on each process, in fp32: together it is small, FSDP2 takes no scalars, and autocast computes norms
in fp32, for which FSDP2 would have cast their gains with the matrices of their block.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from clipq.dist.env import DistEnv
from clipq.dist.gather8 import EightBitGathers


def make_mesh(env: DistEnv, replicas: int) -> DeviceMesh:
    """Processes as [replicas, shards]: those of one copy of the model are neighbours by rank. [shards] for one copy."""
    shape = (replicas, env.world_size // replicas) if replicas > 1 else (env.world_size,)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(env.device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # those of several copies are new, with torch's own limit
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # public under another name since 2.14
            _set_pg_timeout(env.timeout, group)
    return mesh


def _without_leaves(model: nn.Module, inputs: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
    """FSDP2 hooks every output in every forward: on a parameter, as the logit bias is, the hooks would stay."""
    return {name: t.clone() if t.is_leaf and t.requires_grad else t for name, t in output.items()}


class Sharded:
    """Shards a model in place, and does for it what FSDP2 leaves to its user.

    Args:
        model: on its device, with the same weights on every rank; the weights are fp32, and stay so.
        units: modules inside of it whose matrices are gathered together for their forward and backward; the rest of
            the model is one more such unit, which is kept from forward to backward.
        mesh: of `make_mesh`.
        param_dtype: type in which the units' matrices are gathered, which autocast would make of them anyway; None
            for their own. What lies outside of units is gathered as it is: autocast leaves embeddings alone.
        reshard_after_forward: free the units' matrices after the forward, and gather them in the backward again.
        quantized: names of matrices that are used in 8 bits only, with one scale each, and so are gathered in them; and
            in which type. One of which a rank has no row is gathered as the others are.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        mesh: DeviceMesh,
        *,
        param_dtype: torch.dtype | None,
        reshard_after_forward: bool,
        quantized: Mapping[str, torch.dtype],
    ) -> None:
        self._model, self._reshard, self._param_dtype = model, reshard_after_forward, param_dtype
        self._small = [p for p in model.parameters() if p.ndim < 2]
        model.register_forward_hook(_without_leaves)  # before FSDP2's own
        for module in (*units, model):
            root = module is model
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=reshard_after_forward and not root,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=None if root else param_dtype,
                    reduce_dtype=torch.float32,
                    cast_forward_inputs=False,  # the residual stream is fp32
                ),
                ignored_params=set(self._small),
            )
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        # By itself a backward gathers ahead in the order of all forwards since the last one, an evaluation's too, whose
        # last may differ between ranks.
        for sooner, later in zip((model, *units), (*units, model), strict=True):
            later.set_modules_to_backward_prefetch([sooner])  # pyright: ignore[reportCallIssue]
        self._gathers = self._in_8_bits(quantized, mesh.size(-1))
        # before FSDP2's own hook, after which its streams no longer wait for this one
        model.register_forward_pre_hook(lambda *_: self._gathers.scale(), prepend=True)
        self._begin()

    def bytes_of_weights(self) -> int:
        """Bytes of all matrices as they are gathered: what comes to a rank in a forward, its own share included."""
        units = {id(p) for unit in self._units if unit is not self._model for p in unit.parameters()}
        sizes = {id(p): 1 for p in self._gathers.matrices}
        wide = self._param_dtype
        return sum(
            p.numel() * sizes.get(id(p), wide.itemsize if wide and id(p) in units else p.element_size())
            for p in self._model.parameters()
            if p.ndim >= 2
        )

    def _in_8_bits(self, quantized: Mapping[str, torch.dtype], shards: int) -> EightBitGathers:
        matrices = {self._model.get_parameter(name): dtype for name, dtype in quantized.items()}

        def on_all_ranks(rows: int) -> bool:
            return -(-rows // shards) * (shards - 1) < rows

        return EightBitGathers({p: dtype for p, dtype in matrices.items() if on_all_ranks(p.shape[0])})

    def _begin(self) -> None:
        """Lets the model be the root before anything calls a unit by itself, as an evaluation may."""
        setattr(self._model, "begin", types.MethodType(lambda _, unused: unused, self._model))  # noqa: B010
        register_fsdp_forward_method(self._model, "begin")
        with torch.no_grad():
            self._model.begin(0)  # pyright: ignore[reportCallIssue]  on a GPU, FSDP2 fails without an argument
        del self._model.begin
        for unit in self._units:
            unit.reshard()

    @torch.no_grad()
    def average_small(self) -> None:
        """Means over ranks of the gradients that FSDP2 leaves alone, after the backward. Collective."""
        grads = [p.grad for p in self._small if p.grad is not None]
        if not grads:
            return
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = flat.split([g.numel() for g in grads])
        for grad, mean in zip(grads, means, strict=True):
            grad.copy_(mean.view_as(grad))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights on every rank, so that ranks may call the model, and parts of it, as often as each likes.

        For an evaluation, in which ranks have unequal shares. Collective at its begin.
        """
        self._model.set_reshard_after_forward(False)  # pyright: ignore[reportCallIssue]
        self._gathers.scale()
        for unit in self._units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in self._units:
                unit.set_reshard_after_forward(self._reshard and unit is not self._model, recurse=False)
                unit.reshard()
