"""The composition root: configuration -> objects. The only place that sees both."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipq.build_backend import (
    AUTOCAST,
    compile_blocks,
    convert,
    wants_graph,
    warn_of_launches,
    warn_of_slow_bf16,
)
from clipq.build_data import build_stream, find_sources, loader_processes, train_batches
from clipq.build_eval import build_encoder, build_evaluators
from clipq.build_parallel import parallelize
from clipq.build_watch import build_guard, build_watch
from clipq.config.checks import ConfigError
from clipq.config.choices import Loss, Optimizer, Precision, Wandb
from clipq.config.groups import BackendConfig, ModelConfig, OptimConfig
from clipq.config.hydra import configs_dir
from clipq.config.schema import TrainJob
from clipq.data.order import usual_lanes
from clipq.data.remote import RemoteError
from clipq.data.shards import names_digest
from clipq.dist.env import DistEnv
from clipq.dist.gather import gather_objects, raised_on_every_rank
from clipq.dist.stop import Stop
from clipq.log.console import Console
from clipq.log.meters import flops_per_pair
from clipq.log.writers import JsonlWriter, TensorBoardWriter, WandbWriter, Writer
from clipq.loss.contrastive import contrastive_loss
from clipq.loss.sigmoid import sigmoid_loss
from clipq.model.clip import ClipModel, create_model
from clipq.optim.groups import decay_groups
from clipq.optim.loss_scale import FixedLossScaler
from clipq.optim.stable_adamw import StableAdamW
from clipq.train.checkpoint import Checkpoints, load
from clipq.train.graph import Graphed
from clipq.train.kept import Keep, newest
from clipq.train.loop import forward_backward
from clipq.train.run import Normalize, Run
from clipq.train.schedule import Schedule
from clipq.train.state import TrainState
from clipq.train.upload import Uploads
from clipq.watch.spikes import Rules, SpikeDetector

log = logging.getLogger(__name__)

LOSSES = {Loss.softmax: contrastive_loss, Loss.siglip: sigmoid_loss}


@contextmanager
def reported_as_config_error() -> Iterator[None]:
    """What the data and model layers find wrong with a file or a name is a mistake in the configuration here.

    Collective: what one rank finds ends all of them, with one message of rank 0, which alone speaks of configuration.
    """
    with raised_on_every_rank(ConfigError):
        try:
            yield
        except (FileNotFoundError, PermissionError, RemoteError, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def build_model(config: ModelConfig, loss: Loss = Loss.softmax, *, meta: bool = False) -> ClipModel:
    """The model of a configuration on the CPU, with tokenizer and preprocessing, and what the loss needs of it.

    Args:
        meta: on the device `meta` instead, without numbers.
    """
    packaged = configs_dir() / "arch" / f"{config.name}.json"
    return create_model(
        str(packaged) if packaged.is_file() else config.name,
        pretrained=config.pretrained,
        image_size=config.image_size,
        layer_scale_init=config.layer_scale_init,
        patch_dropout=config.patch_dropout,
        qk_norm=config.qk_norm,
        grad_checkpointing=config.grad_checkpointing,
        logit_bias=loss is Loss.siglip,
        meta=meta,
    )


def freeze_untrained(clip: ClipModel, job: TrainJob) -> None:
    """Freezes what the loss does not train.

    Raises:
        ConfigError: the loss leaves out a part of the model that it should not.
    """
    if job.loss is Loss.softmax and getattr(clip.model, "logit_bias", None) is not None:
        raise ConfigError(
            f"loss=softmax with model.name={job.model.name}: a SigLIP model, whose logit bias it does not train: "
            "choose loss=siglip"
        )
    decoder: nn.Module | None = getattr(clip.model, "text_decoder", None)
    if decoder is not None:
        decoder.requires_grad_(False)
        log.warning("text_decoder is not trained: clipq has CoCa's contrastive loss, not its captioning loss")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW | StableAdamW:
    groups = decay_groups(model, config.weight_decay)
    betas = (config.beta1, config.beta2)
    if config.name is Optimizer.adamw:
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    return StableAdamW(
        groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        clip_threshold=config.clip_threshold,
        beta2_power=config.beta2_power,
    )


def build_scaler(model: nn.Module, config: BackendConfig, env: DistEnv) -> torch.amp.GradScaler | FixedLossScaler:
    if config.loss_scale is not None:
        return FixedLossScaler(model.named_parameters(), config.loss_scale)
    return torch.amp.GradScaler(env.device.type, enabled=config.precision is Precision.fp16)


def build_schedule(job: TrainJob) -> Schedule:
    s = job.schedule
    return Schedule(s.decay.value, job.optim.lr, job.steps, s.warmup, s.cooldown, s.final_lr)


def build_writers(job: TrainJob, folder: Path, env: DistEnv, *, step: int, config: dict[str, Any]) -> Sequence[Writer]:
    if not env.is_main:
        return []
    writers: list[Writer] = [JsonlWriter(folder / "metrics.jsonl", from_step=step)]
    if job.log.tensorboard:
        writers.append(TensorBoardWriter(folder / "tensorboard", from_step=step))
    if job.log.wandb is not Wandb.off:
        writers.append(
            WandbWriter(
                folder,
                mode=job.log.wandb.value,
                project=job.log.wandb_project,
                entity=job.log.wandb_entity,
                name=job.name,
                config=config,
            )
        )
    return writers


def build_run(job: TrainJob, env: DistEnv, folder: Path, yaml: str, console: Console, stop: Stop | None = None) -> Run:
    """Everything that `train` needs, at the step of the newest checkpoint in the run folder.

    The order is: data (cheap to find wrong), model, conversion to the recipe, parallel, compile, optimizer, checkpoint.
    """
    stop = stop or Stop()
    warn_of_slow_bf16(job.backend, env.device)
    torch.manual_seed(job.seed)
    with reported_as_config_error():
        sources = find_sources(job.data)
        for source in sources:
            source.check()
        evaluators, _ = build_evaluators(job.eval)
        clip = build_model(job.model, job.loss)
    freeze_untrained(clip, job)
    for line in clip.report.lines():
        log.info("%s", line)
    flops = flops_per_pair(clip.model, clip.preprocess.size, clip.context_length)
    clip.model.to(env.device)
    recorded = wants_graph(job, clip, env)
    pairs = job.batch_size // (env.world_size * job.accumulation)
    convert(clip, job.backend, pairs=pairs, training=True)
    if not recorded:
        warn_of_launches(job.backend, env.device)
    stream = torch.cuda.Stream(env.device) if recorded and env.is_distributed else None
    model, sharded = parallelize(clip, job.parallel, job.backend, env, stream)
    compile_blocks(clip.model, job.backend, env)
    optimizer = build_optimizer(clip.model, job.optim)
    spikes = SpikeDetector(Rules(ignore=job.watch.ignore))
    state = TrainState(clip.model, optimizer, build_scaler(clip.model, job.backend, env), spikes=spikes)
    torch.manual_seed(job.seed + env.rank)  # dropout differs between ranks, initial weights do not

    watch = build_watch(clip.model, optimizer, job.watch, env, recorded=recorded)
    keep, address = Keep(job.checkpoint.keep_last, job.checkpoint.keep_every), job.checkpoint.upload
    checkpoints = Checkpoints(
        folder / "checkpoints",
        env,
        every=job.checkpoint.every,
        minutes=job.checkpoint.minutes,
        keep=keep,
        uploads=Uploads(folder, f"{address}/{job.name}", keep) if address and env.is_main else None,
        config=yaml,
        architecture=clip.openclip_json(),
    )
    shards = {source.setting: source.shards for source in sources}
    order = {"shards": sum(map(len, shards.values())), "shard_names": names_digest(shards)}
    with reported_as_config_error():
        lanes = resume(checkpoints, state, env, order, job.data.lanes)
    if checkpoints.uploads is not None and (path := newest(checkpoints.folder)) is not None:
        checkpoints.uploads.add(path)  # the run may have ended before
    lanes = lanes or usual_lanes(max(map(len, shards.values())), env.world_size)
    samples = build_stream(job.data, sources, lanes, clip, env, batch_size=job.batch_size, seed=job.seed)
    workers = loader_processes(job.data, lanes, env)
    run = Run(
        env=env,
        state=state,
        model=model,
        normalize=Normalize(clip.preprocess.mean, clip.preprocess.std, env.device),
        schedule=build_schedule(job),
        loader=functools.partial(train_batches, samples, workers, job.data, env),
        loader_info=order | {"lanes": lanes, "world_size": env.world_size},
        encoder=build_encoder(clip, job.backend, job.eval, env, console, stop, sharded),
        sharded=sharded,
        evaluators=evaluators,
        checkpoints=checkpoints,
        console=console,
        writers=[],
        folder=folder,
        steps=job.steps,
        batch_size=job.batch_size,
        accumulation=job.accumulation,
        autocast=AUTOCAST[job.backend.precision],
        flops_per_image=flops,
        clip_norm=job.optim.clip_norm,
        max_logit_scale=job.max_logit_scale,
        guard=build_guard(clip.model, job),
        watch=watch,
        loss=LOSSES[job.loss],
        quantization_every=job.watch.quantization,
        log_every=job.log.every,
        eval_every=job.eval.every,
        profile=(job.log.profile[0], job.log.profile[1]) if job.log.profile else None,
        stop=stop,
    )
    run.guard.learn(state.learned)
    if recorded:
        run.graph = Graphed(
            functools.partial(forward_backward, run),
            before_recording=optimizer.zero_grad,
            device=env.device,
            stream=stream,
        )
    return run


def resume(
    checkpoints: Checkpoints, state: TrainState, env: DistEnv, order: dict[str, int], lanes: int | None
) -> int | None:
    """Takes the newest checkpoint into the state, if there is one.

    Args:
        order: what the order of samples depends on besides settings that a run keeps: {"shards", "shard_names"}.
        lanes: it depends on these too; None where none were asked for.

    Returns:
        Lanes of the run; None where they were not asked for and there is no checkpoint.

    Raises:
        ConfigError: the run was begun with another order of samples, in which its place is lost.
    """
    path = gather_objects(newest(checkpoints.folder))[0]  # as rank 0 sees it
    if path is None:
        if (checkpoints.folder.parent / "metrics.jsonl").exists():
            log.warning(
                "%s has no complete checkpoint: the run begins anew (checkpoint.every sets how often one is saved)",
                checkpoints.folder.parent,
            )
        return lanes
    saved = load(path, state, env)
    anew = f"or choose another name=, with model.pretrained={path} to start from its weights"
    if any(saved[key] != order[key] for key in ("shards", "shard_names")):
        raise ConfigError(
            f"data.shards: {path} was trained on {saved['shards']} shards, and the {order['shards']} of now have other "
            f"names or another order, so that its place in them is lost: put them back (in any folder), {anew}"
        )
    if lanes not in (None, saved["lanes"]):
        raise ConfigError(
            f"data.lanes={lanes}: {path} was trained with data.lanes={saved['lanes']}, on which the order of samples "
            f"depends: leave it at that, {anew}"
        )
    if saved["lanes"] % env.world_size:
        some = [n for n in range(1, saved["lanes"] + 1) if saved["lanes"] % n == 0]
        raise ConfigError(
            f"{path} was trained with {saved['lanes']} lanes of data, which {env.world_size} processes cannot share "
            f"evenly: start {', '.join(map(str, some))}, {anew}"
        )
    log.info("resumed from %s at step %d", path, state.step)
    if saved["world_size"] != env.world_size:
        log.warning(
            "%d processes, and there were %d: samples go on in the same order, but the random numbers of dropout "
            "differ from those of an uninterrupted run",
            *(env.world_size, saved["world_size"]),
        )
    return saved["lanes"]
