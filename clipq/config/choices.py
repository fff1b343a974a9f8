"""Settings that are one of a few words."""

from __future__ import annotations

from enum import Enum


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


class Optimizer(Enum):
    adamw = "adamw"
    stable_adamw = "stable_adamw"


class Loss(Enum):
    softmax = "softmax"
    siglip = "siglip"


class Decay(Enum):
    cosine = "cosine"
    constant = "constant"
    constant_cooldown = "constant_cooldown"


class Strategy(Enum):
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"
    none = "none"


class TaskKind(Enum):
    zero_shot = "zero_shot"
    retrieval = "retrieval"
    linear_probe = "linear_probe"
    multi_label = "multi_label"


class MissingData(Enum):
    error = "error"
    report = "report"


class Wandb(Enum):
    off = "off"
    online = "online"
    offline = "offline"


class GuardPolicy(Enum):
    stop = "stop"
    skip = "skip"
    rewind = "rewind"
