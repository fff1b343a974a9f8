"""Every setting of clipq, typed and documented where it is declared; imports nothing of clipq.

Hydra merges `configs/` and the command line onto these dataclasses. Each `__post_init__` checks the values of
its own class; checks that look at several groups, at the number of processes or at the device are in `check`.
Every message names the setting, what was expected and how to mend it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class ConfigError(ValueError):
    """A setting is wrong; the message says which, what was expected and how to mend it."""


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Resume(Enum):
    auto = "auto"
    never = "never"


class Precision(Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Recipe(Enum):
    bf16 = "bf16"
    llm_int8 = "llm_int8"
    switchback = "switchback"
    switchback_m = "switchback_m"
    switchback_r = "switchback_r"
    switchback_q = "switchback_q"
    fp8_sim = "fp8_sim"
    switchback_fp8_sim = "switchback_fp8_sim"
    fp8 = "fp8"
    switchback_fp8 = "switchback_fp8"
    int8_stochastic = "int8_stochastic"


class Fp8(Enum):
    e4m3 = "e4m3"
    e5m2 = "e5m2"


class Switch(Enum):
    auto = "auto"
    on = "on"
    off = "off"


class Decay(Enum):
    cosine = "cosine"
    constant = "constant"
    constant_cooldown = "constant_cooldown"


class Strategy(Enum):
    ddp = "ddp"
    none = "none"


class TaskKind(Enum):
    zero_shot = "zero_shot"
    retrieval = "retrieval"


class Wandb(Enum):
    off = "off"
    online = "online"
    offline = "offline"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _strings(name: str, value: Any) -> None:
    """Accepts one string or a non-empty list of strings: Hydra has no such union type."""
    ok = isinstance(value, str) or (
        isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)
    )
    _require(ok, f"{name}={value!r}: expected a path, a pattern or a list of them")


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
        _require(
            self.patch_dropout is None or 0 <= self.patch_dropout < 1,
            f"model.patch_dropout={self.patch_dropout}: expected a share in [0, 1)",
        )
        _require(
            self.image_size is None or self.image_size > 0,
            f"model.image_size={self.image_size}: expected a positive number of pixels",
        )


@dataclass
class CaptionConfig:
    field: str = "txt"
    """Where captions are: `txt`, or `json.NAME` for the field NAME of the `json` member (a string or a list)."""
    lines: bool = False
    """A `txt` member holds one caption a line; one is chosen at random each time the sample is seen."""

    def __post_init__(self) -> None:
        _require(
            self.field == "txt" or (self.field.startswith("json.") and len(self.field) > 5),
            f"data.caption.field={self.field!r}: expected 'txt' or 'json.NAME', as in 'json.captions'",
        )


@dataclass
class AugmentConfig:
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Area of the random crop as a share of the image, [smallest, largest] (OpenCLIP's default)."""
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    """Aspect ratio of the random crop, [smallest, largest]."""
    flip: float = 0.0
    """Probability of a horizontal flip. Leave at 0 where captions speak of left and right."""
    color_jitter: list[float] = field(default_factory=list)
    """Strengths [brightness, contrast, saturation, hue]; empty for none."""
    color_jitter_prob: float = 0.8
    """Probability that a sample's colours are jittered, where `color_jitter` is set."""
    grayscale: float = 0.0
    """Probability that a sample loses its colours."""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            _require(
                len(pair) == 2 and 0 < pair[0] <= pair[1],
                f"data.augment.{name}={pair}: expected [smallest, largest], both positive",
            )
        _require(self.scale[1] <= 1, f"data.augment.scale={self.scale}: a crop is at most the whole image, 1.0")
        _require(
            len(self.color_jitter) in (0, 4),
            f"data.augment.color_jitter={self.color_jitter}: expected none or 4 numbers, "
            "[brightness, contrast, saturation, hue]",
        )
        for name in ("flip", "color_jitter_prob", "grayscale"):
            p = getattr(self, name)
            _require(0 <= p <= 1, f"data.augment.{name}={p}: expected a probability in [0, 1]")


@dataclass
class DataConfig:
    name: str = MISSING
    """Short name of the data set; part of the default run name."""
    root: str | None = None
    """Folder of the data set, for `shards` and evaluation to refer to. The built-in set needs none."""
    shards: Any = MISSING
    """Training shards (.tar, .tar.gz): a path, a `{00000..00099}` range, a glob, or a list of them."""
    image: str = "jpg;jpeg;png;webp"
    """Member extensions that hold the image, first match wins, separated by semicolons."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """Where captions are and how one is chosen."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Training augmentation."""
    workers: int | None = None
    """Loader processes for each rank; None takes the CPU cores of this rank less one, between 1 and 14. 0 loads in the
    training process."""
    prefetch: int = 4
    """Batches that each loader process keeps ready."""
    shuffle: int = 4096
    """Samples (encoded) that each loader process shuffles at a time; 1 keeps the order of the shard."""

    def __post_init__(self) -> None:
        _strings("data.shards", self.shards)
        _require(self.workers is None or self.workers >= 0, f"data.workers={self.workers}: expected 0 or more")
        _require(self.prefetch >= 1, f"data.prefetch={self.prefetch}: expected 1 or more")
        _require(self.shuffle >= 1, f"data.shuffle={self.shuffle}: expected 1 or more")


@dataclass
class BackendConfig:
    precision: Precision = Precision.bf16
    """Arithmetic of the towers: autocast to bf16 or fp16 over fp32 weights, or fp32 throughout."""
    recipe: Recipe = Recipe.bf16
    """How the linear layers inside of the transformer blocks multiply; bf16 leaves them to `precision`. See
    docs/low_precision.md."""
    fp8_forward: Fp8 = Fp8.e4m3
    """fp8 type of activations and weights, for recipes of fp8."""
    fp8_grad: Fp8 = Fp8.e5m2
    """fp8 type of gradients, for recipes of fp8."""
    compile: Switch = Switch.auto
    """torch.compile each block: auto compiles on CUDA only."""
    cuda_graph: Switch = Switch.auto
    """Record forward and backward of the training step as a CUDA graph, so that launches cost nothing: auto does it
    with one process on one GPU, for models all of whose blocks are clipq's, without gradient checkpointing."""

    def __post_init__(self) -> None:
        _require(
            "fp8" in self.recipe.value or (self.fp8_forward is Fp8.e4m3 and self.fp8_grad is Fp8.e5m2),
            f"backend.fp8_forward and backend.fp8_grad with backend.recipe={self.recipe.value}: they are for recipes "
            f"of fp8: {', '.join(r.value for r in Recipe if 'fp8' in r.value)}",
        )


@dataclass
class OptimConfig:
    name: str = "adamw"
    """Optimizer: adamw."""
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

    def __post_init__(self) -> None:
        _require(self.name == "adamw", f"optim.name={self.name!r}: expected one of adamw")
        _require(self.lr > 0, f"optim.lr={self.lr}: expected a positive learning rate")
        for name in ("beta1", "beta2"):
            b = getattr(self, name)
            _require(0 <= b < 1, f"optim.{name}={b}: expected a decay in [0, 1)")
        _require(self.eps > 0, f"optim.eps={self.eps}: expected a positive number")
        _require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: expected 0 or more")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm={self.clip_norm}: expected a positive norm, or null for no clipping",
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
        _require(self.warmup >= 0, f"schedule.warmup={self.warmup}: expected 0 or more steps")
        _require(self.cooldown >= 0, f"schedule.cooldown={self.cooldown}: expected 0 or more steps")
        _require(
            (self.cooldown > 0) == (self.decay is Decay.constant_cooldown),
            f"schedule.cooldown={self.cooldown} with schedule.decay={self.decay.value}: a cooldown belongs to "
            "constant_cooldown, which needs at least 1 step of it",
        )
        _require(
            0 <= self.final_lr <= 1,
            f"schedule.final_lr={self.final_lr}: expected a share of the peak in [0, 1]",
        )


@dataclass
class ParallelConfig:
    strategy: Strategy = Strategy.ddp
    """How several processes share the work: ddp, or none for a single process."""
    bucket_mb: int = 25
    """Megabytes of gradient in one all-reduce of DDP."""
    timeout_minutes: float = 30.0
    """A collective that takes longer than this ends the run."""

    def __post_init__(self) -> None:
        _require(self.bucket_mb > 0, f"parallel.bucket_mb={self.bucket_mb}: expected a positive number")
        _require(
            self.timeout_minutes > 0,
            f"parallel.timeout_minutes={self.timeout_minutes}: expected a positive number",
        )


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
        _require(self.every >= 1, f"log.every={self.every}: expected 1 or more steps")
        _require(
            self.profile is None or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
            f"log.profile={self.profile}: expected [first, last], steps counted from 1",
        )


@dataclass
class TaskConfig:
    kind: TaskKind = TaskKind.zero_shot
    """zero_shot (classification) or retrieval (image to text and back)."""
    shards: Any = None
    """Evaluation shards, as `data.shards`: members image + `cls`, or image + captions for retrieval."""
    folder: str | None = None
    """In place of shards: a folder of images, one sub-folder for each class in the order of their names."""
    image: str = "jpg;jpeg;png;webp"
    """Member extensions that hold the image."""
    classnames: str | None = None
    """A file with a class name a line, line n naming class n; or `openclip:imagenet`."""
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
        _require(self.every >= 0, f"eval.every={self.every}: expected 0 or more steps")
        _require(self.batch_size >= 1, f"eval.batch_size={self.batch_size}: expected 1 or more")
        for name, task in self.tasks.items():
            _check_task(f"eval.tasks.{name}", task)


def _check_task(where: str, task: TaskConfig) -> None:
    _require(
        (task.shards is None) != (task.folder is None),
        f"{where}: set exactly one of shards= and folder=",
    )
    if task.shards is not None:
        _strings(f"{where}.shards", task.shards)
    if task.kind is TaskKind.zero_shot:
        _require(
            task.classnames is not None,
            f"{where}.classnames is not set: name a file with a class name a line",
        )
        _require(task.templates is not None, f"{where}.templates is not set: name a file with a template a line")
    else:
        _require(task.folder is None, f"{where}.folder: retrieval reads shards, where captions stand beside images")


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

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every={self.every}: expected 0 or more steps")
        _require(self.minutes >= 0, f"checkpoint.minutes={self.minutes}: expected 0 or more")
        _require(
            self.keep_last >= 1,
            f"checkpoint.keep_last={self.keep_last}: expected 1 or more, or nothing could resume",
        )
        _require(self.keep_every >= 0, f"checkpoint.keep_every={self.keep_every}: expected 0 or more steps")


@dataclass
class TrainJob:
    """What `clipq-train` runs."""

    model: ModelConfig = MISSING
    """Architecture and initial weights (group `model`)."""
    data: DataConfig = MISSING
    """Training data (group `data`)."""
    backend: BackendConfig = MISSING
    """Arithmetic and compilation (group `backend`)."""
    optim: OptimConfig = MISSING
    """Optimizer (group `optim`)."""
    schedule: ScheduleConfig = MISSING
    """Learning-rate schedule (group `schedule`)."""
    parallel: ParallelConfig = MISSING
    """Work over several processes (group `parallel`)."""
    log: LogConfig = MISSING
    """Console, metrics, trackers, profiler (group `log`)."""
    eval: EvalConfig = MISSING
    """Evaluation during and after training (group `eval`)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and which are kept."""
    name: str = MISSING
    """Name of the run: its folder is `runs/<name>`. The same name again resumes the run."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 256
    """Pairs in one step over all ranks."""
    seed: int = 0
    """Decides initial weights, order of samples, augmentation and dropout."""
    device: Device = Device.auto
    """auto takes CUDA where there is one."""
    resume: Resume = Resume.auto
    """auto continues the run folder at its newest checkpoint; never refuses a folder that has one."""
    max_logit_scale: float = 100.0
    """The logit scale is clamped to at most this after each step."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps={self.steps}: expected 1 or more")
        _require(self.batch_size >= 2, f"batch_size={self.batch_size}: a contrast needs at least 2 pairs")
        _require(self.seed >= 0, f"seed={self.seed}: expected 0 or more")
        _require(self.max_logit_scale >= 1, f"max_logit_scale={self.max_logit_scale}: expected 1 or more")
        s = self.schedule
        _require(
            s.warmup + s.cooldown <= self.steps,
            f"schedule.warmup={s.warmup} and schedule.cooldown={s.cooldown} are longer than the run, "
            f"steps={self.steps}: lower them or raise steps",
        )
        _require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"name={self.name!r}: expected a folder name without '/'; runs= sets the folder that it lies in",
        )


@dataclass
class EvalJob:
    """What `clipq-eval` runs."""

    checkpoint: str = MISSING
    """What to evaluate: a run folder, a checkpoint folder, a weights file, or an OpenCLIP tag (with `model=`)."""
    model: ModelConfig | None = None
    """Architecture of the weights (group `model`); not needed for a clipq run or checkpoint, which carries its own."""
    backend: BackendConfig = MISSING
    """Arithmetic and compilation (group `backend`)."""
    eval: EvalConfig = MISSING
    """What to evaluate on (group `eval`)."""
    output: str | None = None
    """JSON file for the results; None writes `eval/<step or file name>.json` beside the checkpoint."""
    device: Device = Device.auto
    """auto takes CUDA where there is one."""
    parallel: ParallelConfig = MISSING
    """Work over several processes (group `parallel`)."""

    def __post_init__(self) -> None:
        _require(
            len(self.eval.tasks) > 0,
            "eval has no tasks: choose a data set, as in eval=tiny_imagenet eval.root=/data/tiny_imagenet",
        )


def check(job: TrainJob, *, world_size: int, capability: tuple[int, int] | None) -> None:
    """Checks that look at the processes and the device.

    Raises:
        ConfigError: the job cannot run with `world_size` processes on this device.
    """
    _require(
        job.batch_size % world_size == 0,
        f"batch_size={job.batch_size} is not divisible by the {world_size} processes: "
        f"the nearest that is: {max(1, round(job.batch_size / world_size)) * world_size}",
    )
    _require(
        job.parallel.strategy is not Strategy.none or world_size == 1,
        f"parallel=none with {world_size} processes: choose parallel=ddp, or start one process",
    )
    check_backend(job.backend, device=job.device, capability=capability)
    _require(
        job.backend.cuda_graph is not Switch.on
        or (capability is not None and job.device is not Device.cpu and world_size == 1),
        "backend.cuda_graph=on needs a CUDA GPU and a single process: choose backend.cuda_graph=auto",
    )
    _require(
        job.backend.cuda_graph is not Switch.on or not job.model.grad_checkpointing,
        "backend.cuda_graph=on with model.grad_checkpointing=true: recomputation cannot be recorded; choose one",
    )


def check_backend(backend: BackendConfig, *, device: Device, capability: tuple[int, int] | None) -> None:
    """Checks what a backend needs of the device.

    Args:
        capability: compute capability of this process's GPU, None where there is none.

    Raises:
        ConfigError: the device lacks it.
    """
    _require(
        device is not Device.cuda or capability is not None,
        "device=cuda: no CUDA GPU is visible to torch; use device=cpu, or check the driver and CUDA_VISIBLE_DEVICES",
    )
    on_cuda = capability is not None and device is not Device.cpu
    _require(
        backend.precision is not Precision.fp16 or on_cuda,
        "backend=fp16 needs a CUDA GPU (loss scaling and fp16 kernels): choose backend=bf16 or backend=fp32 on a CPU",
    )
    if capability is None or not on_cuda:
        return
    simulated, real = (Recipe.fp8_sim, Recipe.switchback_fp8_sim), (Recipe.fp8, Recipe.switchback_fp8)
    needed = (8, 9) if backend.recipe in real else (8, 0)
    _require(
        backend.recipe is Recipe.bf16 or backend.recipe in simulated or capability >= needed,
        f"backend.recipe={backend.recipe.value} needs a GPU of compute capability {needed[0]}.{needed[1]} or newer, "
        f"this one has {capability[0]}.{capability[1]}: choose backend=bf16, or backend=fp8_sim or switchback_fp8_sim",
    )
