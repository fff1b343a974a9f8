"""Builds a CLIP model by OpenCLIP name or JSON file, with tokenizer and preprocessing, on clipq's blocks.

The model is OpenCLIP's own (`CLIP`, `CustomTextCLIP` or `CoCa`), built and initialised by OpenCLIP; then
`surgery.py` replaces the residual blocks of its towers.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import merge_preprocess_dict
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from clipq.model.arch import SCHEMES, Architecture, apply_settings, read_architecture
from clipq.model.surgery import BlockReport, replace_blocks
from clipq.model.weights import (
    CONFIG_FILE,
    WeightsError,
    advice,
    find_weights,
    load_openclip,
    read_preprocess,
    read_weights,
)


@dataclass(frozen=True)
class Preprocess:
    """How images of any size become the model's input."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    mean: tuple[float, ...]
    """Of each channel, for values in [0, 1]."""
    std: tuple[float, ...]
    interpolation: str
    """`bicubic`, `bilinear` or, for training only, `random`."""
    resize_mode: str
    """`shortest` (then a centre crop), `longest` (then padding) or `squash`; for evaluation only."""
    fill_color: int
    """Of the padding, 0 to 255."""


@dataclass(frozen=True)
class ClipModel:
    """A model with what belongs to it."""

    name: str
    """OpenCLIP name, or path of the JSON file."""
    model: nn.Module
    """Called with `image` (B, 3, H, W) and `text` (B, context_length); returns a dict of `image_features`
    and `text_features`, (B, E) of length 1, `logit_scale`, already exponentiated, and `logit_bias` if it has one."""
    tokenizer: Callable[..., Tensor]
    """A string or a list of N -> (N, context_length) int64."""
    preprocess: Preprocess
    report: BlockReport
    """Which blocks are clipq's own."""
    config: dict[str, Any]
    """OpenCLIP's model configuration with the settings applied."""

    @property
    def context_length(self) -> int:
        """Tokens of a text."""
        return int(getattr(self.tokenizer, "context_length"))  # noqa: B009

    def openclip_json(self) -> str:
        """The architecture in OpenCLIP's own format, `open_clip_config.json`, which `create_model` reads too."""
        preprocess = getattr(self.model.get_submodule("visual"), "preprocess_cfg")  # noqa: B009
        return json.dumps({"model_cfg": self.config, "preprocess_cfg": preprocess}, indent=1) + "\n"


def create_model(
    name: str,
    *,
    pretrained: str | None = None,
    image_size: int | None = None,
    layer_scale_init: float | None = None,
    patch_dropout: float | None = None,
    qk_norm: bool = False,
    grad_checkpointing: bool = False,
    logit_bias: bool = False,
    meta: bool = False,
) -> ClipModel:
    """Builds a model on the CPU in fp32, in training mode; torch's default generator draws its weights.

    Args:
        name: OpenCLIP name (`ViT-B-32`), or a path to a JSON file in OpenCLIP's format.
        pretrained: initial weights: an OpenCLIP tag, or anything that `weights.read_weights` reads.
        image_size: input side in pixels; position embeddings of `pretrained` are interpolated.
        layer_scale_init: initial value of layer scale in both towers; 0.0 starts every block as the identity.
        patch_dropout: share of the image patches dropped in training.
        qk_norm: layer norm on queries and keys, in both towers.
        grad_checkpointing: recompute each block's activations in the backward.
        logit_bias: the model has a bias of its logits, for SigLIP's loss. This and the logit scale begin at the values
            of SigLIP's paper where the architecture names none.
        meta: build it on torch's device `meta`: shapes and no numbers, in no memory. Weights of `pretrained` have to be
            there, and are not read.

        None (False) leaves the model's own setting.

    Raises:
        ValueError: unknown model, bad JSON, a setting that the model cannot honour, a tokenizer out of reach.
        WeightsError: `pretrained` cannot be found, downloaded or read, or does not fit. A ValueError too.
    """
    arch = read_architecture(name)
    config = apply_settings(
        arch,
        image_size=image_size,
        layer_scale_init=layer_scale_init,
        patch_dropout=patch_dropout,
        qk_norm=qk_norm,
        grad_checkpointing=grad_checkpointing,
        logit_bias=logit_bias,
    )
    tag, file = _resolve_pretrained(arch, pretrained)
    tokenizer = _tokenizer(arch)
    if meta:
        with torch.device("meta"):
            model = _build(arch, config, None, image_size, load_text=False, device="meta")
    else:
        model = _build(arch, config, tag, image_size, load_text=file is None)
    if arch.vision_kind == "timm":
        _check_timm_size(model, arch)
    if grad_checkpointing:
        _checkpoint_blocks(model, arch)
    report = replace_blocks(model)
    if file is not None and not meta:
        load_openclip(model, read_weights(file), source=f"weights {file} into {arch.name}")
        _adopt_preprocess(model, read_preprocess(file))
    return ClipModel(arch.name, model, tokenizer, _preprocess(model), report, config)


def _resolve_pretrained(arch: Architecture, pretrained: str | None) -> tuple[str | None, Path | None]:
    """The tag, the file or neither that `pretrained` means."""
    if pretrained is None:
        return None, None
    named = not arch.from_file and not arch.name.startswith(SCHEMES)
    tags = open_clip.list_pretrained_tags_by_model(arch.name) if named else []
    if pretrained in tags:
        return pretrained, None
    if Path(pretrained).exists():
        return None, find_weights(pretrained)
    expected = f"its tags: {', '.join(tags)}" if tags else "it has no tags, only a file will do"
    raise WeightsError(
        f"model.pretrained={pretrained} with {arch.name}: neither a file or folder here, nor a tag of this "
        f"model ({expected})"
    )


def _build(
    arch: Architecture,
    config: dict[str, Any],
    tag: str | None,
    image_size: int | None,
    *,
    load_text: bool,
    device: str = "cpu",
) -> nn.Module:
    if arch.vision_kind == "timm":
        config["vision_cfg"]["timm_model_pretrained"] = False  # random unless `pretrained` says otherwise
        if arch.from_file:  # OpenCLIP would prepare images of the size in the file for a tower of timm's own size
            image_size = config["vision_cfg"].get("image_size")
    if arch.text_kind == "huggingface":
        config["text_cfg"]["hf_model_pretrained"] = load_text and tag is None
    # timm towers take another size only through force_image_size, the others through the configuration.
    options: dict[str, Any] = {"pretrained": tag, "force_image_size": image_size, "output_dict": True, "device": device}
    try:
        with _quiet():
            if not arch.from_file:
                keys = ("vision_cfg", "text_cfg", "multimodal_cfg", "init_logit_scale", "init_logit_bias")
                settings = {k: config[k] for k in keys if k in config}
                return open_clip.create_model(arch.name, **options, **settings)
            with tempfile.TemporaryDirectory() as folder:
                content = {"model_cfg": config, "preprocess_cfg": arch.preprocess}
                Path(folder, CONFIG_FILE).write_text(json.dumps(content), encoding="utf-8")
                return open_clip.create_model(f"local-dir:{folder}", **options)
    except Exception as error:
        raise _explain(error, arch, config, tag) from error


def _check_timm_size(model: Any, arch: Architecture) -> None:
    """Raises ValueError for a size that the tower would meet with an assertion at its first image."""
    trunk, (height, width) = model.visual.trunk, model.visual.image_size
    own = tuple(trunk.pretrained_cfg["input_size"][1:])
    fixed = trunk.pretrained_cfg.get("fixed_input_size") and not hasattr(trunk, "set_input_size")
    embed: Any = getattr(trunk, "patch_embed", None)
    patch = embed.patch_size if isinstance(embed, PatchEmbed) and not embed.dynamic_img_pad else (1, 1)
    if fixed and (height, width) != own:
        expected = f"{own[0]}, the only one it takes"
    elif height % patch[0] or width % patch[1]:
        expected = f"a multiple of its patches of {patch[0]}, such as {max(1, round(height / patch[0])) * patch[0]}"
    else:
        return
    raise ValueError(
        f"model {arch.name}: an image size of {height} with the timm model "
        f"{arch.config['vision_cfg']['timm_model_name']}: expected {expected}: set "
        "model.image_size, or image_size in the JSON file"
    )


def _explain(error: Exception, arch: Architecture, config: dict[str, Any], tag: str | None) -> ValueError:
    """OpenCLIP and timm raise many types; what a user can do about them is one of four things."""
    text = str(error)
    if "patch_drop_rate" in text:
        vision = config["vision_cfg"]
        return ValueError(
            f"model.patch_dropout={vision['patch_dropout']} with {arch.name}: its image tower, the timm "
            f"model {vision['timm_model_name']}, has no patch dropout: set it to null, or choose a ViT"
        )
    if "download" in text and tag is not None:
        return WeightsError(
            f"model.pretrained={tag} with {arch.name}: the download failed: {_first_line(text)}\n"
            "Check the network; or download them elsewhere and give the file: model.pretrained=PATH"
        )
    if "loading state_dict" in text:
        hints = "".join(f"\n  They have no {hint}" for hint in advice(text.replace('"', " ").replace(",", " ").split()))
        return WeightsError(f"model.pretrained={tag} with {arch.name}: {text}{hints}")
    return ValueError(f"model {arch.name}: OpenCLIP cannot build it: {type(error).__name__}: {text}")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


def _tokenizer(arch: Architecture) -> Callable[..., Tensor]:
    text = arch.config["text_cfg"]
    hub = text.get("hf_tokenizer_name")
    try:
        with _quiet():
            if not arch.from_file:
                return open_clip.get_tokenizer(arch.name)
            length = text.get("context_length", 77)
            options = text.get("tokenizer_kwargs") or {}
            if hub:
                mode = text.get("tokenizer_mode")
                return HFTokenizer(hub, context_length=length, tokenizer_mode=mode, **options)
            return open_clip.get_tokenizer("", context_length=length, **options)
    except Exception as error:
        hint = "\nIt comes from the Hugging Face hub: needs `pip install transformers` and the network once."
        raise ValueError(
            f"model {arch.name}: cannot load its tokenizer{f' {hub}' if hub else ''}: "
            f"{_first_line(str(error))}{hint if hub else ''}"
        ) from error


def _checkpoint_blocks(model: Any, arch: Architecture) -> None:
    if isinstance(model.visual, TimmModel):
        try:  # OpenCLIP's own method would only warn
            trunk: Any = model.visual.trunk
            trunk.set_grad_checkpointing(True)
        except Exception as error:
            raise ValueError(
                f"model.grad_checkpointing=true with {arch.name}: its image tower, the timm model "
                f"{type(model.visual.trunk).__name__}, has no gradient checkpointing: set it to false"
            ) from error
    model.set_grad_checkpointing(True)


def _preprocess(model: nn.Module) -> Preprocess:
    cfg: dict[str, Any] = getattr(model.get_submodule("visual"), "preprocess_cfg")  # noqa: B009
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocess(
        size=(int(height), int(width)),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        resize_mode=cfg["resize_mode"],
        fill_color=cfg["fill_color"],
    )


def _adopt_preprocess(model: Any, stored: dict[str, Any]) -> None:
    """Mean, standard deviation and the like belong to the weights; the size is the model's."""
    if stored:
        own = model.visual.preprocess_cfg
        set_model_preprocess_cfg(model, merge_preprocess_dict(own, {**stored, "size": own["size"]}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what OpenCLIP says through the root logger while it builds; real warnings pass.

    Its `logging.info(…)` would also install a handler on the root logger of the process, if that has none.
    """
    expected = ("No pretrained weights loaded", "no CLIP weights found", "Failed to download weights")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not any(e in record.getMessage() for e in expected)

    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
        root.removeHandler(handler)
