"""The groups of settings, typed and documented where each is declared. `__post_init__` checks the values of one
class."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from clipq.config.checks import require, strings
from clipq.config.choices import Decay, Fp8, Optimizer, Precision, Recipe, Strategy, Switch, TaskKind, Wandb
from clipq.config.data import CaptionConfig


@dataclass
class ModelConfig:
    name: str = MISSING
    """OpenCLIP model name (`ViT-B-32`), one of clipq's small models (`ViT-S-8-64`), or a path to a JSON file."""
    pretrained: str | None = None
    """Start from these weights: a file (OpenCLIP `.pt`, `.safetensors`), a clipq checkpoint, or an OpenCLIP tag."""
    image_size: int | None = None
    """Input side in pixels; None keeps the model's own. Position embeddings of loaded weights are interpolated."""
    layer_scale_init: float | None = None
    """Initial value of layer scale in both towers; 0.0 is the paper's; None keeps the model's own setting."""
    patch_dropout: float | None = None
    """Share of image patches dropped in training, in [0, 1); None keeps the model's own setting."""
    qk_norm: bool = False
    """Layer norm on queries and keys of every attention, in both towers."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward: less memory, about a third more time."""

    def __post_init__(self) -> None:
        require(
            self.patch_dropout is None or 0 <= self.patch_dropout < 1,
            f"model.patch_dropout={self.patch_dropout}: expected a share in [0, 1)",
        )
        require(
            self.layer_scale_init is None or math.isfinite(self.layer_scale_init),
            f"model.layer_scale_init={self.layer_scale_init}: expected a finite number",
        )
        require(
            self.image_size is None or self.image_size > 0,
            f"model.image_size={self.image_size}: expected a positive number of pixels",
        )


@dataclass
class BackendConfig:
    precision: Precision = Precision.bf16
    """Arithmetic of the towers: autocast to bf16 or fp16 over fp32 weights, or fp32 throughout."""
    recipe: Recipe = Recipe.bf16
    """How the linear layers inside of the transformer blocks multiply; bf16 leaves them to `precision`. See
    docs/low_precision.md."""
    loss_scale: float | None = None
    """For fp16: a fixed scale of the loss (the paper advises 65536), where a tensor whose gradient overflows is left
    out of the step; None for torch's dynamic scale, which leaves out the whole step."""
    fp8_forward: Fp8 = Fp8.e4m3
    """fp8 type of activations and weights, for recipes of fp8."""
    fp8_grad: Fp8 = Fp8.e5m2
    """fp8 type of gradients, for recipes of fp8."""
    skip: str = "off"
    """Leave blocks in 16 bits where the recipe would be slower: `auto` by the table that comes with clipq for this GPU,
    or a file made by `python -m clipq.lowp.measure`; `off` converts all."""
    compile: Switch = Switch.auto
    """torch.compile each block: auto compiles on CUDA only."""
    cuda_graph: Switch = Switch.auto
    """Record forward and backward of the training step as a CUDA graph, so that launches cost nothing. `auto` does it
    on GPUs for models all of whose blocks are clipq's, without hybrid shards (HSDP), gradient checkpointing and
    accumulation."""

    def __post_init__(self) -> None:
        require(
            "fp8" in self.recipe.value or (self.fp8_forward is Fp8.e4m3 and self.fp8_grad is Fp8.e5m2),
            f"backend.fp8_forward and backend.fp8_grad with backend.recipe={self.recipe.value}: they are for recipes "
            f"of fp8: {', '.join(r.value for r in Recipe if 'fp8' in r.value)}",
        )
        require(
            self.loss_scale is None or (self.precision is Precision.fp16 and 0 < self.loss_scale < math.inf),
            f"backend.loss_scale={self.loss_scale} with backend.precision={self.precision.value}: expected null, or a "
            "positive number with backend.precision=fp16",
        )
        require(
            self.skip in ("off", "auto") or Path(self.skip).is_file(),
            f"backend.skip={self.skip}: expected off, auto, or a file made by python -m clipq.lowp.measure",
        )
        require(
            self.skip == "off" or self.recipe is not Recipe.bf16,
            f"backend.skip={self.skip} with backend.recipe=bf16: there is nothing to skip; choose backend=switchback",
        )


@dataclass
class OptimConfig:
    name: Optimizer = Optimizer.adamw
    """adamw is torch's, fused; stable_adamw clips each tensor's update by how much its second moment is out of date
    (docs/stability.md)."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.2
    """Decoupled weight decay; gains, biases and the logit scale have none."""
    clip_norm: float | None = None
    """Clip the global gradient norm to this; None does not clip."""
    clip_threshold: float = 1.0
    """For stable_adamw: RMS_t above which a tensor's step is clipped; `inf` gives AdamW."""
    beta2_power: float | None = None
    """For stable_adamw: λ of the schedule beta2 = 1 - t^(-λ), which replaces `beta2`; None for a constant beta2."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"optim.lr={self.lr}: expected a positive, finite learning rate")
        for name in ("beta1", "beta2"):
            b = getattr(self, name)
            require(0 <= b < 1, f"optim.{name}={b}: expected a decay in [0, 1)")
        require(0 < self.eps < math.inf, f"optim.eps={self.eps}: expected a positive, finite number")
        require(
            0 <= self.weight_decay < math.inf,
            f"optim.weight_decay={self.weight_decay}: expected a finite number, 0 or more",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm={self.clip_norm}: expected a positive norm, or null for no clipping",
        )
        require(
            self.clip_threshold > 0,
            f"optim.clip_threshold={self.clip_threshold}: expected a positive number, or inf for no clipping",
        )
        require(
            self.beta2_power is None or 0 < self.beta2_power < math.inf,
            f"optim.beta2_power={self.beta2_power}: expected a positive power, or null for a constant beta2",
        )
        for name, default in (("clip_threshold", 1.0), ("beta2_power", None)):
            require(
                self.name is Optimizer.stable_adamw or getattr(self, name) == default,
                f"optim.{name}={getattr(self, name)} with optim.name={self.name.value}: only optim=stable_adamw has it",
            )


@dataclass
class ScheduleConfig:
    decay: Decay = Decay.cosine
    """After the warm-up: cosine to `final_lr`, constant, or constant with a linear cooldown at the end."""
    warmup: int = 0
    """Steps of linear warm-up from zero."""
    cooldown: int = 0
    """Last steps over which constant_cooldown falls linearly to `final_lr`."""
    final_lr: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        require(self.warmup >= 0, f"schedule.warmup={self.warmup}: expected 0 or more steps")
        require(self.cooldown >= 0, f"schedule.cooldown={self.cooldown}: expected 0 or more steps")
        require(
            (self.cooldown > 0) == (self.decay is Decay.constant_cooldown),
            f"schedule.cooldown={self.cooldown} with schedule.decay={self.decay.value}: a cooldown belongs to "
            "constant_cooldown, which needs at least 1 step of it",
        )
        require(
            0 <= self.final_lr <= 1,
            f"schedule.final_lr={self.final_lr}: expected a share of the peak in [0, 1]",
        )


SHARDING = (Strategy.fsdp, Strategy.hsdp)


@dataclass
class ParallelConfig:
    strategy: Strategy = Strategy.ddp
    """How several processes share the work. ddp: each has the whole model. fsdp: weights, gradients and optimizer state
    lie in shards over all of them. hsdp: over those of a node, and each node has a copy. none: a single process. See
    docs/distributed.md."""
    bucket_mb: int = 25
    """For ddp: megabytes of gradient in one all-reduce."""
    reshard_after_forward: bool = True
    """For fsdp and hsdp: free the weights of a block after its forward, and gather them again in the backward; false
    takes more memory and sends less."""
    replicas: int | None = None
    """For hsdp: copies of the model, each in shards over an equal part of the processes; None: one on each node."""
    timeout_minutes: float = 30.0
    """A collective that takes longer than this ends the run: building, evaluations and checkpoints among them."""
    step_timeout_minutes: float = 10.0
    """A step that takes longer than this on a rank, or the wait for its data, ends the run, and tells which rank is
    behind. Not for the first steps, nor for those after an evaluation or a checkpoint."""

    def __post_init__(self) -> None:
        require(self.bucket_mb > 0, f"parallel.bucket_mb={self.bucket_mb}: expected a positive number")
        require(
            self.replicas is None or self.replicas >= 2,
            f"parallel.replicas={self.replicas}: expected 2 or more; with one copy choose parallel=fsdp",
        )
        for name, default, have in (
            ("bucket_mb", 25, (Strategy.ddp,)),
            ("reshard_after_forward", True, SHARDING),
            ("replicas", None, (Strategy.hsdp,)),
        ):
            value = getattr(self, name)
            shown = str(value).lower() if isinstance(value, bool) else value
            require(
                value == default or self.strategy in have,
                f"parallel.{name}={shown} with parallel={self.strategy.value}: only "
                f"{' and '.join(f'parallel={s.value}' for s in have)} {'has' if len(have) == 1 else 'have'} it",
            )
        for name in ("timeout_minutes", "step_timeout_minutes"):
            minutes = getattr(self, name)
            require(0 < minutes < math.inf, f"parallel.{name}={minutes}: expected a positive, finite number")

    def copies(self, world_size: int, local_world_size: int) -> int:
        """Copies of the model that are in shards, under fsdp or hsdp.

        Args:
            local_world_size: processes on this node.

        Raises:
            ConfigError: the processes cannot share so many evenly, or there is nothing left to share.
        """
        if self.strategy is Strategy.fsdp or world_size == 1:
            return 1
        replicas = self.replicas or world_size // local_world_size
        given = f"parallel.replicas={self.replicas}" if self.replicas else "parallel=hsdp (a copy on each node)"
        mend = "set parallel.replicas to a divisor of the processes that is from 2 to half of them, or choose parallel="
        require(
            replicas > 1,
            f"{given} with {world_size} processes on one node: that would be one copy: set parallel.replicas=2 or "
            "more, or choose parallel=fsdp",
        )
        require(
            world_size % replicas == 0,
            f"{given} with {world_size} processes: they cannot share {replicas} copies evenly: {mend}fsdp",
        )
        require(
            replicas < world_size,
            f"{given} with {world_size} processes: each would have a whole copy: {mend}ddp",
        )
        return replicas


@dataclass
class LogConfig:
    every: int = 10
    """Steps between two console lines, and between two writes of the metrics."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: Wandb = Wandb.off
    """Weights & Biases: off, online or offline. A resumed run keeps its run id."""
    wandb_project: str = "clipq"
    """Project of the wandb run."""
    wandb_entity: str | None = None
    """Team or user of the wandb run; None takes wandb's default."""
    profile: list[int] | None = None
    """[first, last] step to record with torch's profiler; the trace goes to the run folder."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every={self.every}: expected 1 or more steps")
        require(
            self.profile is None or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
            f"log.profile={self.profile}: expected [first, last], steps counted from 1",
        )


@dataclass
class TaskConfig:
    kind: TaskKind = TaskKind.zero_shot
    """zero_shot (classification), retrieval (image to text and back) or linear_probe (a linear classifier of the image
    features, fitted to training images; takes scikit-learn: clipq[probe])."""
    shards: Any = None
    """Evaluation shards, as `data.shards`: members image + `cls`, or image + captions for retrieval."""
    folder: str | None = None
    """In place of shards: a folder of images, one sub-folder for each class in the order of their names."""
    benchmark: str | None = None
    """In place of shards: a data set in CLIP_benchmark's layout, a folder or an address, with class names, templates
    and what kind of task it is."""
    split: str = "test"
    """Of `benchmark`: the folder of its shards."""
    train_shards: Any = None
    """For linear_probe: training shards, as `shards`."""
    train_folder: str | None = None
    """For linear_probe, in place of train_shards: a folder with one sub-folder for each class, as `folder`."""
    train_split: str = "train"
    """For linear_probe, of `benchmark`: the folder of its training shards."""
    image: str = "jpg;jpeg;png;webp"
    """Member extensions that hold the image."""
    classnames: str | None = None
    """A file with a class name a line, line n naming class n; or `openclip:imagenet`. Goes before a benchmark's own."""
    templates: str | None = None
    """A file with a prompt template a line, `{}` or `{c}` for the class; or `openclip:imagenet` (80 templates), or
    `openclip:simple` (7)."""
    subsets: dict[str, str] = field(default_factory=dict)
    """Name -> file with a class name a line: the accuracy on those classes is reported too, scored against all."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """For retrieval: where captions are; every caption counts."""


@dataclass
class EvalConfig:
    root: str | None = None
    """Folder of the evaluation data, for tasks to refer to."""
    every: int = 0
    """Evaluate every so many steps; 0 evaluates at the end only."""
    batch_size: int = 256
    """Images at a time on each rank."""
    workers: int | None = None
    """Loader processes for each rank; None as `data.workers`."""
    examples: int = 12
    """Images of each task kept with their best captions for the report."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name -> what to evaluate."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every={self.every}: expected 0 or more steps")
        require(self.batch_size >= 1, f"eval.batch_size={self.batch_size}: expected 1 or more")
        for name, task in self.tasks.items():
            _check_task(f"eval.tasks.{name}", task)


def _check_task(where: str, task: TaskConfig) -> None:
    given = [name for name in ("shards", "folder", "benchmark") if getattr(task, name) is not None]
    require(len(given) == 1, f"{where}: set exactly one of shards=, folder= and benchmark=")
    if task.shards is not None:
        strings(f"{where}.shards", task.shards)
    _check_training(where, task)
    if task.benchmark is not None:
        return
    if task.kind is TaskKind.zero_shot:
        require(
            task.classnames is not None,
            f"{where}.classnames is not set: name a file with a class name a line",
        )
        require(task.templates is not None, f"{where}.templates is not set: name a file with a template a line")
    elif task.kind is TaskKind.retrieval:
        require(task.folder is None, f"{where}.folder: retrieval reads shards, where captions stand beside images")
        require(
            isinstance(task.caption.field, str),
            f"{where}.caption.field={task.caption.field}: every caption of a field counts in an evaluation, none by "
            "chance: expected one field, 'txt' or 'json.NAME'",
        )


def _check_training(where: str, task: TaskConfig) -> None:
    given = [name for name in ("train_shards", "train_folder") if getattr(task, name) is not None]
    if task.kind is not TaskKind.linear_probe:
        require(not given, f"{where}.{given and given[0]} with {where}.kind={task.kind.value}: it is for linear_probe")
        return
    require(not task.subsets, f"{where}.subsets: they are for zero_shot; a linear probe knows no class names")
    if task.benchmark is not None:
        require(not given, f"{where}.{given and given[0]} with {where}.benchmark: set {where}.train_split")
        require(
            task.train_split != task.split,
            f"{where}.train_split={task.train_split}: the split that the probe is tested on",
        )
        return
    require(len(given) == 1, f"{where}: a linear probe is fitted: set exactly one of train_shards= and train_folder=")
    if task.train_shards is not None:
        strings(f"{where}.train_shards", task.train_shards)


@dataclass
class CheckpointConfig:
    every: int = 1000
    """Steps between two checkpoints; 0 for none but the last."""
    minutes: float = 30.0
    """Minutes between two checkpoints, whichever comes first; 0 for none."""
    keep_last: int = 2
    """Keep this many of the newest checkpoints."""
    keep_every: int = 0
    """Keep also each checkpoint whose step is a multiple of this; 0 for none."""
    upload: str | None = None
    """Folder at an address that fsspec can write, as s3://bucket/runs: a copy of the run is kept in `<upload>/<name>`,
    and a run that finds a newer checkpoint there than in its own folder goes on from it."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every}: expected 0 or more steps")
        require(self.minutes >= 0, f"checkpoint.minutes={self.minutes}: expected 0 or more")
        require(
            self.keep_last >= 1,
            f"checkpoint.keep_last={self.keep_last}: expected 1 or more, or nothing could resume",
        )
        require(self.keep_every >= 0, f"checkpoint.keep_every={self.keep_every}: expected 0 or more steps")
