"""The group `parallel` of the configuration, applied to a model."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipq.build_backend import AUTOCAST
from clipq.config.checks import ConfigError
from clipq.config.choices import Recipe
from clipq.config.groups import SHARDING, BackendConfig, ParallelConfig
from clipq.dist.env import DistEnv
from clipq.dist.shard import Sharded, make_mesh
from clipq.lowp.linear import LowpLinear
from clipq.model.clip import ClipModel
from clipq.model.surgery import blocks

log = logging.getLogger(__name__)


def parallelize(
    clip: ClipModel,
    config: ParallelConfig,
    backend: BackendConfig,
    env: DistEnv,
    stream: torch.cuda.Stream | None = None,
) -> tuple[nn.Module, Sharded | None]:
    """What is called in place of the model, and what FSDP leaves to be done where it has sharded the model.

    A single process has the model as it is, whatever the strategy.

    Args:
        stream: on which the step is to run, where it is to be recorded.

    Raises:
        ConfigError: FSDP finds none of clipq's blocks, or the processes do not fit the copies of the model.
    """
    if not env.is_distributed:
        return clip.model, None
    if config.strategy in SHARDING:
        return clip.model, _shard(clip, config, backend, env)
    with torch.cuda.stream(stream):  # does nothing for None
        wrapped = DistributedDataParallel(
            clip.model,
            device_ids=[env.device.index] if env.device.type == "cuda" else None,
            bucket_cap_mb=config.bucket_mb,
            gradient_as_bucket_view=True,
        )
    return wrapped, None


def units_of(clip: ClipModel, config: ParallelConfig) -> list[nn.Module]:
    """The modules that are sharded one by one.

    Raises:
        ConfigError: there are none.
    """
    units: list[nn.Module] = [block for _, block in blocks(clip.model)]
    if not units:
        raise ConfigError(
            f"parallel={config.strategy.value}: no tower of this model has clipq's blocks, which are sharded one by "
            "one: choose parallel=ddp, or a ViT of OpenCLIP such as model=vit_b_32"
        )
    return units


def _shard(clip: ClipModel, config: ParallelConfig, backend: BackendConfig, env: DistEnv) -> Sharded:
    units = units_of(clip, config)
    for name in clip.report.kept:
        log.warning(
            "parallel=%s: all of %s is whole from forward to backward: it has blocks of its own",
            config.strategy.value,
            name,
        )
    replicas = config.copies(env.world_size, env.local_world_size)
    copies = "1 copy of the model, in" if replicas == 1 else f"{replicas} copies of the model, each in"
    sharded = Sharded(
        clip.model,
        units,
        make_mesh(env, replicas),
        # a low-precision layer quantizes the fp32 weight: one rounded to 16 bits before would be further off
        param_dtype=AUTOCAST[backend.precision] if backend.recipe is Recipe.bf16 else None,
        reshard_after_forward=config.reshard_after_forward,
        quantized={
            f"{name}.weight": layer.recipe.weight_dtype
            for name, layer in clip.model.named_modules()
            if isinstance(layer, LowpLinear) and layer.recipe.weight_dtype is not None
        },
    )
    log.info(
        "%s: %s %d shards; all weights travel as %.1f MiB, %.1f in fp32",
        config.strategy.value,
        copies,
        env.world_size // replicas,
        sharded.bytes_of_weights() / 2**20,
        4 / 2**20 * sum(p.numel() for p in clip.model.parameters() if p.ndim >= 2),
    )
    return sharded
