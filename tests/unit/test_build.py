"""Each setting arrives in the object that it configures. Every value here differs from every default."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from clipq.build import build_model, build_optimizer, build_schedule
from clipq.build_backend import convert, warn_of_slow_bf16
from clipq.build_data import build_captions, build_filter, build_stream, find_sources, warn_of_parts
from clipq.config.checks import ConfigError
from clipq.config.choices import Decay, Fp8, Loss, Optimizer, Precision, Recipe
from clipq.config.data import AugmentConfig, CaptionConfig, DataConfig, FilterConfig, SourceConfig
from clipq.config.groups import BackendConfig, LogConfig, ModelConfig, OptimConfig, ScheduleConfig
from clipq.config.schema import TrainJob
from clipq.data.decode import Captions, TrainTransform
from clipq.data.filters import Filter, Range
from clipq.data.source import Source
from clipq.dist.env import DistEnv
from clipq.lowp import LowpLinear
from clipq.model.clip import create_model
from clipq.model.surgery import blocks
from clipq.model.weights import save_weights
from clipq.optim import StableAdamW
from clipq.train.schedule import Schedule

SECOND_OF_THREE = DistEnv(rank=1, world_size=3, local_rank=1, local_world_size=3, device=torch.device("cpu"))


def test_optimizer(arch: Path) -> None:
    model = build_model(ModelConfig(name=str(arch))).model
    optimizer = build_optimizer(
        model, OptimConfig(lr=0.3, beta1=0.7, beta2=0.8, eps=1e-3, weight_decay=0.4, clip_norm=5.0)
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.4, 0.0)
    for group in (decayed, plain):
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.7, 0.8), 1e-3)
    assert "logit_scale" in plain["param_names"]
    assert {n for n, p in model.named_parameters() if p.ndim >= 2} == set(decayed["param_names"])
    held = {id(p) for group in (decayed, plain) for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_siglip_gives_a_model_a_logit_bias(arch: Path, tmp_path: Path) -> None:
    config = json.loads(arch.read_text())
    own = tmp_path / "own.json"
    own.write_text(json.dumps(config | {"init_logit_bias": -3.0, "init_logit_scale": 1.0}))
    for name, loss, bias, scale in (
        (str(arch), Loss.softmax, None, math.log(1 / 0.07)),
        (str(arch), Loss.siglip, -10, math.log(10)),
        (str(own), Loss.siglip, -3, 1),
        ("RN50", Loss.siglip, -10, math.log(10)),
    ):
        clip = build_model(ModelConfig(name=name), loss)
        found: Any = clip.model
        assert (found.logit_bias is None) is (bias is None)
        assert bias is None or found.logit_bias.item() == bias
        assert found.logit_scale.item() == pytest.approx(scale)
        assert json.loads(clip.openclip_json())["model_cfg"].get("init_logit_bias") == bias, "evaluation needs it"


def test_stable_adamw(arch: Path) -> None:
    own = {"lr": 0.3, "beta1": 0.7, "beta2": 0.8, "eps": 1e-3, "clip_threshold": 2.5, "beta2_power": 0.6}
    config = OptimConfig(name=Optimizer.stable_adamw, weight_decay=0.4, **own)
    optimizer = build_optimizer(build_model(ModelConfig(name=str(arch))).model, config)
    assert isinstance(optimizer, StableAdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.7, 0.8), 1e-3)
        assert (group["clip_threshold"], group["beta2_power"]) == (2.5, 0.6)


@pytest.mark.parametrize(
    ("capability", "precision", "device", "warned"),
    [
        ("AVX2", "bf16", "cpu", True),
        ("AVX512", "bf16", "cpu", False),
        ("AVX2", "fp32", "cpu", False),
        ("AVX2", "bf16", "cuda", False),
    ],
)
def test_slow_bf16_is_told(capability, precision, device, warned, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    warn_of_slow_bf16(BackendConfig(precision=Precision(precision)), torch.device(device))
    assert ("choose backend=fp32" in caplog.text) == warned


def test_recipe_and_its_fp8_types(arch: Path) -> None:
    clip = build_model(ModelConfig(name=str(arch)))
    config = BackendConfig(recipe=Recipe.switchback_fp8, fp8_forward=Fp8.e5m2, fp8_grad=Fp8.e4m3)
    convert(clip, config, pairs=4, training=True)
    layers = [m for m in clip.model.modules() if isinstance(m, LowpLinear)]
    assert len(layers) == 12
    for layer in layers:
        output, grad_input = layer.recipe.output, layer.recipe.grad_input
        assert output is not None
        assert grad_input is not None
        assert output.left.dtype is output.right.dtype is grad_input.right.dtype is torch.float8_e5m2
        assert grad_input.left.dtype is torch.float8_e4m3fn


def test_schedule() -> None:
    job = TrainJob(
        name="x",
        steps=100,
        log=LogConfig(),
        optim=OptimConfig(lr=2.0),
        schedule=ScheduleConfig(decay=Decay.constant_cooldown, warmup=10, cooldown=20, final_lr=0.25),
    )
    schedule = build_schedule(job)
    expected = Schedule("constant_cooldown", 2.0, 100, 10, 20, 0.25)
    assert [schedule(step) for step in range(1, 101)] == [expected(step) for step in range(1, 101)]
    assert [schedule(step) for step in (5, 10, 50, 81, 91, 101)] == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.25, 0.5])


def test_captions() -> None:
    assert build_captions(CaptionConfig(field="json.words", lines=False)) == Captions("json.words", False)
    assert build_captions(CaptionConfig(field="txt", lines=True)) == Captions("txt", True)
    shares = {"txt": 0.25, "json.words": 0.75}
    assert build_captions(CaptionConfig(field=shares)) == Captions(shares)


def test_filter() -> None:
    config = FilterConfig(min_size=3, max_aspect=4.5, caption_length=[None, 7], json={"a": [0.1, None], "b": [1, 2]})
    ranges = {"a": Range(0.1, math.inf), "b": Range(1, 2)}
    assert build_filter(config) == Filter(3, 4.5, Range(-math.inf, 7), ranges)
    assert build_filter(FilterConfig()) == Filter()


def test_stream(shards: list[str], arch: Path) -> None:
    clip = create_model(str(arch), image_size=24)
    augment = AugmentConfig(
        scale=[0.4, 0.6],
        ratio=[0.8, 1.2],
        flip=0.3,
        color_jitter=[0.1, 0.2, 0.3, 0.05],
        color_jitter_prob=0.7,
        grayscale=0.15,
    )
    config = DataConfig(
        name="x",
        shards=shards[1:],
        image="png;gif",
        caption=CaptionConfig(field="json.captions"),
        augment=augment,
        filter=FilterConfig(min_size=5),
        shuffle=17,
    )
    stream = build_stream(config, find_sources(config), 6, clip, SECOND_OF_THREE, batch_size=12, seed=5)
    assert stream.sources == [
        Source(shards[1:], Captions("json.captions"), "png;gif", counts=[None] * (len(shards) - 1), filter=Filter(5))
    ]
    assert stream.transform == TrainTransform(
        size=(24, 24),
        interpolation="bicubic",
        scale=(0.4, 0.6),
        ratio=(0.8, 1.2),
        flip=0.3,
        color_jitter=(0.1, 0.2, 0.3, 0.05),
        color_jitter_prob=0.7,
        grayscale=0.15,
    )
    assert stream.tokenizer is clip.tokenizer
    assert stream.batch_size == 4, "the share of one of three ranks"
    assert (stream.rank, stream.world_size, stream.lanes, stream.seed, stream.shuffle) == (1, 3, 6, 5, 17)


def test_cache(shards: list[str], tmp_path: Path) -> None:
    config = DataConfig(name="x", shards=shards, cache=str(tmp_path / "a" / "b"), cache_gb=0.25)
    cache = find_sources(config)[0].cache
    assert cache is not None
    assert (cache.folder, cache.limit) == (tmp_path / "a" / "b", 250_000_000)
    sources = {"a": SourceConfig(shards=shards[:2]), "b": SourceConfig(shards=shards[2])}
    both = find_sources(dataclasses.replace(config, shards=None, sources=sources))
    assert both[0].cache is both[1].cache is not None, "a limit for all"
    for wrong in ({"cache": None}, {"cache_gb": None}, {"cache_gb": 0.0}, {"cache": ""}):
        with pytest.raises(ConfigError, match=r"data\.cache"):
            dataclasses.replace(config, **wrong)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache=.*/file/x cannot be used \(Not a directory\): name a folder"):
        find_sources(dataclasses.replace(config, cache=str(tmp_path / "file" / "x")))


def test_sources(shards: list[str]) -> None:
    config = DataConfig(
        name="x",
        shards=None,
        image="png",
        filter=FilterConfig(min_size=5),
        sources={
            "a": SourceConfig(shards=shards[:2], weight=3.0, passes=2, filter=FilterConfig(max_aspect=2.0)),
            "b": SourceConfig(shards=shards[2], image="gif", caption=CaptionConfig(field="json.captions")),
        },
    )
    assert find_sources(config) == [
        Source(shards[:2], Captions("txt"), "png", 3.0, 2, [None] * 2, "data.sources.a", Filter(max_aspect=2.0)),
        Source(
            *(shards[2:3], Captions("json.captions"), "gif"),
            counts=[None],
            setting="data.sources.b",
            filter=Filter(min_size=5),
        ),
    ]
    for wrong in ({"shards": shards}, {"sources": {}}):
        with pytest.raises(ConfigError, match="exactly one of them"):
            dataclasses.replace(config, **wrong)


def test_model(arch: Path) -> None:
    clip = build_model(
        ModelConfig(
            name=str(arch),
            image_size=24,
            layer_scale_init=0.125,
            patch_dropout=0.5,
            qk_norm=True,
            grad_checkpointing=True,
        )
    )
    model = clip.model
    assert clip.preprocess.size == (24, 24)
    assert model.get_submodule("visual.patch_dropout").prob == 0.5
    assert model.get_submodule("visual.transformer").grad_checkpointing is True
    found = dict(blocks(model))
    assert len(found) == 3
    for name, block in found.items():
        assert isinstance(block.attn.ln_q, torch.nn.LayerNorm), name
        assert isinstance(block.attn.ln_k, torch.nn.LayerNorm), name
        assert (block.ls_1.gamma == 0.125).all()
        assert (block.ls_2.gamma == 0.125).all()


def test_model_starts_from_the_weights_given(arch: Path, tmp_path: Path) -> None:
    first = build_model(ModelConfig(name=str(arch))).model
    save_weights(first, tmp_path / "w.safetensors")
    again = build_model(ModelConfig(name=str(arch), pretrained=str(tmp_path / "w.safetensors"))).model
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_packaged_model_by_its_name() -> None:
    assert build_model(ModelConfig(name="ViT-S-8-64")).preprocess.size == (64, 64)


def test_sources_of_few_shards_are_named(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    sources = [Source(shards, Captions(), "png"), Source(shards[:1], Captions(), "png", setting="data.sources.small")]
    warn_of_parts(sources, lanes=20)
    assert caplog.messages == [
        "data.sources.small: 20 lanes read 1 shards, so that each shard is read 20 times in a pass: pack them into 20 "
        "or more (clipq-data make)"
    ]
