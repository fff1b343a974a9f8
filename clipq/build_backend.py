"""The group `backend` of the configuration, applied to a model: recipe, compilation, CUDA graph."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipq.config.checks import ConfigError
from clipq.config.choices import Fp8, Precision, Recipe, Strategy, Switch
from clipq.config.groups import BackendConfig
from clipq.config.schema import TrainJob
from clipq.dist.env import DistEnv
from clipq.lowp import convert_linears, get_recipe
from clipq.lowp.speed import SpeedTable, read_table, shipped_table
from clipq.model.block import PatchDropout
from clipq.model.clip import ClipModel
from clipq.model.surgery import blocks

log = logging.getLogger(__name__)

AUTOCAST = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: None}
# Without it the compiler chooses tiles of sums by timing them, and two runs of one command round differently. It is
# given here and not in the environment, where it holds for the first graph alone: after each compilation torch calls
# torch.use_deterministic_algorithms with what was set before, and that sets the compiler's mode too.
COMPILER: dict[str, Any] = {"deterministic": True}
FP8 = {Fp8.e4m3: torch.float8_e4m3fn, Fp8.e5m2: torch.float8_e5m2}


def convert(
    clip: ClipModel, config: BackendConfig, *, pairs: int, training: bool, device_name: str | None = None
) -> None:
    """Turns the linear layers of clipq's blocks into those of the recipe, and says what became of which.

    Args:
        pairs: images, and texts, that this process computes at a time.
        device_name: of the GPU that it is for; None for the device that the model is on.

    Raises:
        ConfigError: the model has no such blocks, or `backend.skip` names no table.
    """
    if config.recipe is Recipe.bf16:
        return
    recipe = get_recipe(config.recipe.value)
    if recipe.is_fp8:
        recipe = recipe.with_formats(forward=FP8[config.fp8_forward], grad=FP8[config.fp8_grad])
    inside = {f"{name}.{layer}" for name, block in blocks(clip.model) for layer in block.linears()}
    if not inside:
        raise ConfigError(
            f"backend.recipe={config.recipe.value}: no tower of this model has clipq's blocks, whose linear layers it "
            "could convert: choose backend=bf16, or a ViT of OpenCLIP such as model=vit_b_32"
        )
    device = next(clip.model.parameters()).device
    table = speed_table(config.skip, recipe.name, device, device_name)
    slow = slow_layers(clip, recipe.name, table, pairs=pairs, training=training) if table is not None else {}

    def wanted(name: str, _: nn.Linear) -> bool | str:
        return slow.get(name, name in inside or "it lies outside of the transformer blocks")

    report = convert_linears(clip.model, recipe, filter=wanted)
    for line in report.lines():
        log.info("%s", line)


def speed_table(skip: str, recipe: str, device: torch.device, name: str | None = None) -> SpeedTable | None:
    """The table that `backend.skip` names; None, with a word why, where there is none. Says what it does not tell.

    Args:
        name: of the GPU, in place of that of `device`.

    Raises:
        ConfigError: no table can be read from the file.
    """
    if skip == "off":
        return None
    if name is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    try:
        table = shipped_table(name) if skip == "auto" else read_table(Path(skip))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"backend.skip={skip}: expected off, auto, or a file made by python -m clipq.lowp.measure: {error}"
        ) from error
    if table is not None and table.device != name:
        log.warning("backend.skip=%s: its speeds are those of %s, and this is %s", skip, table.device, name)
    if table is not None and not any(speed.recipe == recipe for speed in table.speeds):
        log.warning(
            "backend.skip=%s: %s was not measured on %s, so every layer is converted", skip, recipe, table.device
        )
    if table is None:
        log.warning(
            "backend.skip=auto: there is no table of speeds for %s, so every layer is converted; python -m "
            "clipq.lowp.measure my_gpu.json makes one for a GPU, and backend.skip=my_gpu.json takes it",
            name,
        )
    return table


def slow_layers(clip: ClipModel, recipe: str, table: SpeedTable, *, pairs: int, training: bool) -> dict[str, str]:
    """Layers that the table says are slower by the recipe -> why. A block's layers go together, for they are fused."""
    found = {}
    for name, block in blocks(clip.model):
        tokens = pairs * (
            image_tokens(clip.model, training=training) if name.startswith("visual") else clip.context_length
        )
        fc = block.mlp.c_fc
        why = table.why_slower(recipe, fc.in_features, fc.out_features, tokens)
        if why is not None:
            found |= {f"{name}.{layer}": why for layer in block.linears()}
    return found


def image_tokens(model: nn.Module, *, training: bool) -> int:
    """Tokens of one image in OpenCLIP's ViT, after patch dropout."""
    visual = model.get_submodule("visual")
    length = visual.get_parameter("positional_embedding").shape[0]
    dropout = getattr(visual, "patch_dropout", None)
    if training and isinstance(dropout, PatchDropout):
        return 1 + dropout.kept(length - 1)
    return length


def warn_of_slow_bf16(config: BackendConfig, device: torch.device) -> None:
    """Says so where torch multiplies bf16 without instructions for it: by loops, slower than fp32 by far."""
    capability = torch.backends.cpu.get_cpu_capability()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if device.type == "cpu" and config.precision is Precision.bf16 and x86 and not capability.startswith("AVX512"):
        log.warning(
            "backend.precision=bf16 is some ten times slower than fp32 on a CPU without AVX-512 (this one: %s): choose "
            "backend=fp32, or backend.precision=fp32 with another recipe",
            capability,
        )


def warn_of_launches(config: BackendConfig, device: torch.device) -> None:
    """Says what low precision is worth where steps are not recorded: the tables of speeds are of recorded ones."""
    if device.type == "cuda" and config.recipe is not Recipe.bf16:
        log.warning(
            "backend.recipe=%s without a CUDA graph: its kernels are launched one by one, which a host may do slower "
            "than the GPU runs them (seen: a ViT-B/16 at half of bf16's speed, a ViT-H at 0.99 to 1.22 of it)",
            config.recipe.value,
        )


def compile_blocks(model: nn.Module, config: BackendConfig, env: DistEnv) -> None:
    """Compiles each residual block for itself: one graph that all blocks of a tower share, quick to compile.

    `forward` is replaced and not the module, so that names in the state dict stay and FSDP does not undo it.
    """
    if config.compile is Switch.on or (config.compile is Switch.auto and env.device.type == "cuda"):
        # Both towers, training and odd batch sizes share the code of one forward, whose graphs torch counts together.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for _, block in blocks(model):
            block.forward = torch.compile(block.forward, fullgraph=True, options=COMPILER)


def wants_graph(job: TrainJob, clip: ClipModel, env: DistEnv) -> bool:
    """Whether the step is recorded as a CUDA graph: `auto` is where every block is known to run without the host."""
    if job.backend.cuda_graph is not Switch.auto:
        return job.backend.cuda_graph is Switch.on
    possible = env.device.type == "cuda" and not job.model.grad_checkpointing and not clip.report.kept
    if possible and job.accumulation > 1:
        log.info("accumulation=%d: steps are not recorded as a CUDA graph", job.accumulation)
        return False
    if possible and env.is_distributed and job.parallel.strategy is Strategy.hsdp:
        log.info("parallel=hsdp: steps are recorded as a CUDA graph by backend.cuda_graph=on only: not tried on GPUs")
        return False
    return possible
