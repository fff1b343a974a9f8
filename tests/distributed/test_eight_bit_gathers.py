"""Matrices gathered in 8 bits: layers see the very bits that they would have made of the whole weight."""

from __future__ import annotations

import gc
import itertools
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from clipq.dist.env import distributed
from clipq.dist.shard import Sharded, make_mesh
from clipq.lowp import LowpLinear, convert_linears
from clipq.lowp.products import quantize_weight
from tests.helpers import run_distributed

WIDTHS = (24, 40, 17, 8)
"""17 rows are not the same number on each rank."""


class Layers(nn.Sequential):
    """Linear layers; outputs have names, as those of a CLIP model do."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore
        return {"y": super().forward(x)}


def layers_of(recipe: str, widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    torch.manual_seed(0)
    model = Layers(*(nn.Linear(n, m) for n, m in itertools.pairwise(widths)))
    convert_linears(model, recipe)
    return model


def shard(model: nn.Sequential, env: Any, *, eight_bit: bool) -> Sharded:
    layers: Any = model.named_children() if eight_bit else ()
    names = {f"{n}.weight": layer.recipe.weight_dtype for n, layer in layers}
    return Sharded(
        model,
        list(model),
        make_mesh(env, 1),
        param_dtype=None,
        reshard_after_forward=True,
        quantized={name: dtype for name, dtype in names.items() if dtype is not None},
    )


def step(model: nn.Sequential, x: Tensor) -> tuple[Tensor, int]:
    """Forward and backward; the output, and the bytes that a rank gets by gathers, its own included."""
    seen = 0
    gather = DefaultAllGather.__call__

    def count(self: Any, output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += output_tensor.numel() * output_tensor.element_size()
        return gather(self, output_tensor, *args, **kwargs)

    with patch.object(DefaultAllGather, "__call__", count):
        y = model(x)["y"]
        y.square().mean().backward()
    return y, seen


def grads_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]  # type: ignore


def same_bits(recipe: str) -> None:
    with distributed("cpu") as env:
        x = torch.randn(2, 6, WIDTHS[0], generator=torch.Generator().manual_seed(1))[env.rank]
        exact, model = layers_of(recipe), layers_of(recipe)
        expected = [quantize_weight(layer.weight.detach(), layer.recipe) for layer in model]  # type: ignore
        seen = []

        def remember(layer: LowpLinear, *_: Any) -> None:
            seen.append(quantize_weight(layer.weight.detach(), layer.recipe))

        for layer in model:
            layer.register_forward_pre_hook(remember)
        sharded = shard(exact, env, eight_bit=False), shard(model, env, eight_bit=True)
        for number in range(2):  # the second gathers go into the same memory
            (y, wide), (y8, narrow) = step(exact, x), step(model, x)
            assert len(seen) == len(expected)
            for got, want in zip(seen, expected, strict=True):
                assert torch.equal(got.q.float(), want.q.float())
                assert torch.equal(got.qt.float(), want.qt.float())
                torch.testing.assert_close(got.scale, want.scale, rtol=3e-7, atol=0)
            torch.testing.assert_close(y8, y, rtol=1e-5, atol=1e-6)
            for a, b in zip(grads_of(model), grads_of(exact), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert 4 * narrow == wide > 0, (narrow, wide)
            if number == 0:  # other weights have other scales
                seen.clear()
                weights: Any = [layer.weight for layer in (*exact, *model)]
                for weight in weights:
                    weight._local_tensor.mul_(3)
                expected = [w._replace(scale=3 * w.scale) for w in expected]
        with torch.no_grad(), sharded[1].whole():
            torch.testing.assert_close(model(x)["y"], exact(x)["y"], rtol=1e-5, atol=1e-6)
        del exact, model, sharded
        gc.collect()  # or threads of gloo outlive the group
        env.barrier()


@pytest.mark.parametrize("recipe", ["switchback", "switchback_fp8_sim"])
def test_layers_find_the_bits_of_the_whole_weight(recipe: str) -> None:
    run_distributed(same_bits, 2, recipe)


def broken() -> None:
    with distributed("cpu") as env:
        for bad in (torch.nan, torch.inf):
            model = layers_of("switchback")
            sharded = shard(model, env, eight_bit=True)
            weight: Any = model[1].weight
            if env.rank == 1:
                weight._local_tensor[0, 0] = bad
            y, _ = step(model, torch.ones(3, WIDTHS[0]))
            assert not y.isfinite().any(), bad
            del model, sharded
            gc.collect()
        env.barrier()


def test_a_weight_that_is_not_finite_stays_so_on_every_rank() -> None:
    run_distributed(broken, 2)


def few_rows() -> None:
    with distributed("cpu") as env:
        model = layers_of("switchback", (8, 5, 8))
        sharded = shard(model, env, eight_bit=True)  # 5 rows for 4 ranks: 2, 2, 1 and none
        y, _ = step(model, torch.ones(3, 8))
        assert y.isfinite().all()
        del model, sharded
        gc.collect()
        env.barrier()


def test_a_rank_may_have_no_row() -> None:
    run_distributed(few_rows, 4)
