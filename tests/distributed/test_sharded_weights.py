"""Ten steps under DDP, FSDP2 and HSDP give the weights of one process that has the whole batches."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipq.dist.env import distributed
from clipq.optim.shards import local
from clipq.train.run import Run
from tests.distributed.steps import flat, losses_of, run_in, take_steps, weights_of, whole_batches
from tests.helpers import colour_shards, run_distributed, tiny_arch

STEPS = 10
# With a large epsilon AdamW does not make whole steps of the rounding noise in small gradients, of which int8 has much.
BACKENDS = {"fp32": ["backend=fp32"], "switchback": ["backend=switchback", "optim.eps=1e-3"]}
SPLITS = (4, 12)

Case = tuple[str, str, str]
"""Strategy with its settings, backend, optimizer."""
CASES: dict[int, list[tuple[str, str]]] = {
    2: [
        ("fsdp", "adamw"),
        ("fsdp", "stable_adamw"),
        ("fsdp parallel.reshard_after_forward=false", "stable_adamw"),
        ("ddp", "adamw"),
    ],
    4: [
        ("hsdp parallel.replicas=2", "adamw"),
        ("hsdp parallel.replicas=2", "stable_adamw"),
        ("fsdp model.grad_checkpointing=true", "adamw"),
    ],
}


class InParts(nn.Module):
    """A model that computes a batch part by part, as so many processes would."""

    def __init__(self, model: nn.Module, parts: int) -> None:
        super().__init__()
        self.model, self.parts = model, parts

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        outs = [self.model(i, t) for i, t in zip(image.chunk(self.parts), text.chunk(self.parts), strict=True)]
        return outs[0] | {key: torch.cat([out[key] for out in outs]) for key in ("image_features", "text_features")}


def settings(case: Case) -> list[str]:
    strategy, backend, optimizer = case
    return [
        *f"parallel={strategy}".split(),
        *BACKENDS[backend],
        f"optim={optimizer}",
        f"steps={STEPS}",
        "watch.every=1",
    ]


def train(run: Run) -> dict[str, Any]:
    start = weights_of(run)
    steps = take_steps(run, whole_batches(STEPS))
    watched = [run.watch.row(step.watched.tolist()) for step in steps if step.watched is not None]
    for row in watched:
        del row["features"]  # of each rank's own pairs
    sharded = {name for name, p in run.state.model.named_parameters() if isinstance(p, DTensor)}
    return {
        "start": start,
        "weights": weights_of(run),
        "losses": losses_of(steps),
        "norms": torch.stack([step.norms for step in steps]),
        "watched": watched,
        "sharded": sharded,
        "held": sum(local(p).numel() for p in run.state.model.parameters()),
    }


def on_rank(folder: str, cases: list[Case]) -> None:
    with distributed("cpu") as env:
        for number, case in enumerate(cases):
            run = run_in(Path(folder), env, str(number), *settings(case))
            found = train(run)
            if env.is_main:
                torch.save(found, f"{folder}/{number}.pt")
            del run, found
            gc.collect()  # or threads of gloo outlive the group
        env.barrier()


def alone(folder: Path, case: tuple[str, str], parts: int = 1) -> dict[str, Any]:
    """The same steps on one process."""
    with distributed("cpu") as env:
        run = run_in(folder, env, f"alone-{case[1]}-{parts}", *settings(("none", *case)))
        run.model = InParts(run.state.model, parts) if parts > 1 else run.model
        return train(run)


def off(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """How far weights are from the expected ones, as a share of how far those went."""
    a, b = flat(found["weights"]), flat(expected["weights"])
    return ((a - b).norm() / (b - flat(expected["start"])).norm()).item()


def assert_sharded(found: dict[str, Any], expected: dict[str, Any], shards: int) -> None:
    matrices = {name for name, t in expected["weights"].items() if t.ndim >= 2}
    assert found["sharded"] == (matrices if shards > 1 else set())
    assert found["held"] < expected["held"] / shards * 1.02 + 200, "what is not sharded is small"
    torch.testing.assert_close(found["start"], expected["start"], rtol=0, atol=0)
    moved = (flat(expected["weights"]) - flat(expected["start"])).abs()
    assert moved.max() > 1e-3, "nothing moved"


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All that one process finds."""
    torch.testing.assert_close(flat(found["weights"]), flat(expected["weights"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-3, atol=1e-5)
    assert len(found["watched"]) == STEPS
    for row, of_one in zip(found["watched"], expected["watched"], strict=True):
        assert row.keys() == of_one.keys() == {"rms", "parameter_norm", "update_norm"}
        for kind, values in of_one.items():
            assert row[kind] == pytest.approx(values, rel=2e-3, abs=1e-5), kind


@pytest.mark.parametrize(
    ("world", "backend"),
    [
        (2, "fp32"),
        *(pytest.param(w, b, marks=pytest.mark.slow) for w, b in ((2, "switchback"), (4, "fp32"), (4, "switchback"))),
    ],
)
def test_processes_equal_one(world: int, backend: str, tmp_path: Path) -> None:
    colour_shards(tmp_path, [30, 30])
    tiny_arch(tmp_path)
    cases = [(strategy, backend, o) for strategy, o in CASES[world]]
    if backend != "fp32":  # slow on a CPU: one strategy, both optimizers
        cases = cases[:2]
    run_distributed(on_rank, world, str(tmp_path), cases)
    one = {optimizer: alone(tmp_path, (backend, optimizer)) for optimizer in ("adamw", "stable_adamw")}
    for number, (strategy, _, optimizer) in enumerate(cases):
        found, expected = torch.load(tmp_path / f"{number}.pt"), one[optimizer]
        assert_sharded(found, expected, {"ddp": 1, "fsdp": world, "hsdp": world // 2}[strategy.split()[0]])
        if backend == "fp32":
            assert_equal(found, expected)
    if backend == "fp32":
        return
    bound = {
        o: max(off(alone(tmp_path, (backend, o), parts), expected) for parts in SPLITS) for o, expected in one.items()
    }
    for number, case in enumerate(cases):
        share = off(torch.load(tmp_path / f"{number}.pt"), one[case[2]])
        assert share <= min(0.05, 1.5 * bound[case[2]]), case
