"""Inputs and output gradients of linear layers of the image tower, as they are in training.

Shapes: b rows (images × tokens), c columns that are kept, n inputs and m outputs of a layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_common import run_of
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from clipq.build import build_run
from clipq.config.hydra import to_job
from clipq.config.schema import TrainJob
from clipq.dist.env import DistEnv
from clipq.log.console import Console
from clipq.model.surgery import blocks
from clipq.train.kept import newest
from clipq.train.loop import forward_backward
from clipq.train.run import Run

LAYERS = ("attn.in_proj", "mlp.c_fc", "mlp.c_proj")
WHOLE = 1024
"""Rows that are kept with all columns, for the products whose sum runs over these."""


class Rows:
    """X and G of one layer: some columns of them, and what scales for all columns need.

    Args:
        rows: how many are wanted.
        shape: of the layer's weight, (m, n).
        columns: how many are kept of each, chosen by `seed`.
    """

    def __init__(
        self, name: str, rows: int, shape: tuple[int, int], columns: int, seed: int, device: torch.device
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.name, self.shape, self.filled = name, shape, 0
        self.columns = [torch.randperm(k, generator=draw)[:columns].to(device) for k in shape]
        self.g_bc, self.x_bc = (torch.empty(rows, len(c), device=device) for c in self.columns)
        self.g_max_b, self.x_max_b = (torch.empty(rows, device=device) for _ in range(2))
        self.weight_mn: Tensor | None = None
        self.whole: tuple[Tensor, Tensor] | None = None
        """G [≤ WHOLE, m] and X [≤ WHOLE, n]."""

    @property
    def full(self) -> bool:
        return self.filled == len(self.x_bc)

    def add(self, g: Tensor, x: Tensor) -> None:
        """Takes the rows of a batch, as many as are still wanted: G [..., m] and X [..., n]."""
        g, x = (t.detach().flatten(0, -2).float() for t in (g, x))
        take = slice(self.filled, min(self.filled + len(x), len(self.x_bc)))
        count = take.stop - take.start
        pairs = ((g, self.columns[0], self.g_bc, self.g_max_b), (x, self.columns[1], self.x_bc, self.x_max_b))
        for new, columns, kept, row_max in pairs:
            kept[take], row_max[take] = new[:count, columns], new[:count].abs().amax(1)
        if self.whole is None:
            self.whole = (g[:WHOLE].clone(), x[:WHOLE].clone())
        self.filled = take.stop


def gaussian_rows(rows: int, shape: tuple[int, int], columns: int, seed: int, device: torch.device) -> Rows:
    """A control without structure: independent normal numbers, with a weight of them too."""
    draw = torch.Generator(device).manual_seed(seed)
    found = Rows("Gaussian", rows, shape, columns, seed, device)
    while not found.full:
        found.add(*(torch.randn(min(rows, 4096), k, generator=draw, device=device) for k in shape))
    found.weight_mn = torch.randn(shape, generator=draw, device=device)
    return found


def build(source: Path | Sequence[str], changes: Sequence[str], env: DistEnv, folder: Path) -> tuple[Run, int]:
    """A run to take batches and gradients from, and how many steps it was trained.

    Nothing is written into the folder of a trained one.

    Args:
        source: the folder of a run, whose newest checkpoint is taken, or settings of clipq-train for a new one.
        changes: settings that are to differ, such as `data.root=…`; of a run in the names of its config.yaml.
        folder: for what a run writes at once.
    """
    if not isinstance(source, Path):
        return run_of(env, *source, *changes, folder=folder), 0
    checkpoint = newest(source / "checkpoints")
    if checkpoint is None:
        raise SystemExit(f"{source} has no checkpoint")
    stored = OmegaConf.load(checkpoint / "config.yaml")
    settings = [*changes, f"model.pretrained={checkpoint}", "checkpoint.upload=null"]
    merged = OmegaConf.merge(OmegaConf.structured(TrainJob), stored, OmegaConf.from_dotlist(settings))
    assert isinstance(merged, DictConfig)
    merged.eval.tasks = {}  # its data need not be here
    run = build_run(to_job(merged, TrainJob), env, folder, "", Console(enabled=False))
    return run, int(checkpoint.name.removeprefix("step_"))


def training_rows(
    source: Path | Sequence[str],
    changes: Sequence[str] = (),
    *,
    rows: int,
    columns: int,
    seed: int,
    device: torch.device,
) -> tuple[list[Rows], dict[str, Any]]:
    """X and G of three layers in the first, the middle and the last block, over batches as training has them.

    Weights stay as they are. Rows follow each other as in training: token by token, image by image, batch by batch,
    and each batch is contrasted with itself.

    Returns:
        The layers, and what they are of.
    """
    env = DistEnv(0, 1, 0, 1, device)
    with tempfile.TemporaryDirectory() as folder:
        # Recorded, compiled and fused blocks go past the layers' own calls, where hooks are.
        run, step = build(source, [*changes, "backend.compile='off'", "backend.cuda_graph='off'"], env, Path(folder))
        tower = [(name, block) for name, block in blocks(run.state.model) if name.startswith("visual.")]
        for _, block in tower:
            block.fused = None
        chosen = {f"{name}.{layer}": block.get_submodule(layer) for name, block in _spread(tower) for layer in LAYERS}
        found = [Rows(name, rows, layer.weight.shape, columns, seed, device) for name, layer in chosen.items()]
        run.model.train()
        batches, losses = run.loader(None), []
        with _kept(dict(zip(chosen.values(), found, strict=True))):
            while not found[0].full:
                batch = next(batches)
                run.state.optimizer.zero_grad(set_to_none=True)
                losses.append(forward_backward(run, batch["image"], batch["text"])[0].item())
        batches.close()
    for kept, layer in zip(found, chosen.values(), strict=True):
        kept.weight_mn = layer.weight.detach().float().clone()
    facts = {"batches": len(losses), "pairs": run.batch_size, "loss": sum(losses) / len(losses), "trained_steps": step}
    return found, facts


def _spread(tower: list[Any]) -> list[Any]:
    """First, middle and last, or those of them that there are."""
    return [tower[n] for n in sorted({0, len(tower) // 2, len(tower) - 1})]


@contextmanager
def _kept(wanted: dict[nn.Module, Rows]) -> Iterator[None]:
    """Forwards and backwards inside add to the rows of these layers."""

    def hook_of(rows: Rows) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad:  # accumulation has forwards without a backward
                x = inputs[0].detach()
                y.register_hook(lambda g: rows.add(g, x))

        return hook

    handles = [layer.register_forward_hook(hook_of(rows)) for layer, rows in wanted.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
