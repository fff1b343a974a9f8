"""Two processes with and without accumulation: the same weights after some steps, under DDP; the same gradients, under
FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipq.dist.env import DistEnv, distributed
from clipq.train.loop import train_step
from clipq.train.run import Run
from tests.helpers import TINY_ARCH, colour_shards, run_distributed, tiny_arch
from tests.unit.train.runs import run_of

PAIRS, STEPS, RATE = 16, 5, 1e-2


def batches_of(env: DistEnv) -> list[dict[str, Any]]:
    """This rank's parts of a few batches."""
    g = torch.Generator().manual_seed(1)
    own = slice(env.rank * PAIRS // 2, (env.rank + 1) * PAIRS // 2)
    length = TINY_ARCH["text_cfg"]["context_length"]
    return [
        {
            "image": torch.randint(0, 256, (PAIRS, 3, 16, 16), generator=g, dtype=torch.uint8)[own],
            "text": torch.randint(1, 49408, (PAIRS, length), generator=g, dtype=torch.int32)[own],
            "key": [],
            "lost": 0,
            "filtered": {},
            "sources": {},
        }
        for _ in range(STEPS)
    ]


def built(folder: Path, env: DistEnv, *overrides: str) -> Run:
    run = run_of(folder / "tiny.json", sorted(map(str, folder.glob("*.tar"))), *overrides, env=env, folder=folder / "r")
    run.model.train()
    return run


def trained(folder: Path, env: DistEnv, *overrides: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights before and after, and the losses of the steps."""
    run = built(folder, env, f"batch_size={PAIRS}", f"steps={STEPS}", *overrides)
    start = {n: p.detach().clone() for n, p in run.state.model.named_parameters()}
    losses, storages = [], []
    run.state.model.get_parameter("visual.proj").register_post_accumulate_grad_hook(
        lambda p: storages.append(p.grad.untyped_storage().data_ptr())
    )
    for step, batch in enumerate(batches_of(env)):
        run.state.step = step
        losses.append(train_step(run, batch, RATE).numbers[0].item())
    assert len(storages) == STEPS * run.accumulation
    if run.accumulation > 1:  # DDP makes its buckets anew in the second step
        assert len(set(storages[2 * run.accumulation :])) == 1, "sums lie beside DDP's buckets, not in them"
    return start, dict(run.state.model.named_parameters()), losses


def compare(start: dict[str, Tensor], one: dict[str, Tensor], four: dict[str, Tensor]) -> None:
    assert one.keys() == four.keys()
    for name in one:
        a, b, before = (weights[name].detach() for weights in (one, four, start))
        if name.endswith("attn.in_proj.bias"):  # the keys' part has a gradient of rounding noise alone
            a, b, before = (torch.cat((x.chunk(3)[0], x.chunk(3)[2])) for x in (a, b, before))
        assert (a - before).abs().max() > RATE, name
        assert (a - b).abs().max() < 1e-5, f"{name}: {(a - b).abs().max()}"


def ddp_rank(folder: str) -> None:
    with distributed("cpu") as env:
        for optimizer, loss in (("adamw", "softmax"), ("stable_adamw", "siglip")):
            settings = (f"optim={optimizer}", f"loss={loss}", "optim.eps=1e-4")
            start, one, losses = trained(Path(folder), env, *settings)
            _, four, losses_of_four = trained(Path(folder), env, *settings, "accumulation=4")
            compare(start, one, four)
            assert losses_of_four == pytest.approx(losses, abs=1e-4)
            assert abs(losses[-1] - losses[0]) > 1e-2
            torch.save({n: p.detach() for n, p in four.items()}, f"{folder}/{optimizer}_{env.rank}.pt")


def test_ddp_trains_the_same_weights(tmp_path: Path) -> None:
    colour_shards(tmp_path, [30, 30])
    tiny_arch(tmp_path)
    run_distributed(ddp_rank, 2, str(tmp_path))
    for optimizer in ("adamw", "stable_adamw"):
        first, second = (torch.load(tmp_path / f"{optimizer}_{r}.pt") for r in range(2))
        assert all(torch.equal(first[n], second[n]) for n in first)


def fsdp_rank(folder: str) -> None:
    with distributed("cpu") as env:
        settings = (f"batch_size={PAIRS}", "backend=switchback", "backend.precision=fp32")
        batch = batches_of(env)[0]
        run = built(Path(folder), env, *settings)
        loss = train_step(run, batch, 0.0).numbers[0]
        expected = {n: p.grad for n, p in run.state.model.named_parameters()}
        run = built(Path(folder), env, *settings, "accumulation=4", "parallel=fsdp")
        for step in range(2):  # the second step too, before which gradients are dropped
            run.state.step = step
            found = train_step(run, batch, 0.0).numbers[0]
            torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
            for name, p in run.state.model.named_parameters():
                grad: Any = p.grad
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                scale = max(expected[name].abs().max().item(), 1e-2)
                assert (whole - expected[name]).abs().max() < 1e-5 * scale, name


def test_fsdp_has_the_gradients_of_ddp_without_accumulation(tmp_path: Path) -> None:
    colour_shards(tmp_path, [30, 30])
    tiny_arch(tmp_path)
    run_distributed(fsdp_rank, 2, str(tmp_path))
