"""Architectures as OpenCLIP describes them, by name or as a JSON file, with clipq's settings applied."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import open_clip
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

SCHEMES = ("hf-hub:", "local-dir:")
LIST_ALL = "python -c \"import open_clip; print(*open_clip.list_models(), sep='\\n')\""
_TOP_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu")
_TOP_KEYS += ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")


@dataclass(frozen=True)
class Architecture:
    """A model as OpenCLIP's configuration describes it."""

    name: str
    """As the user wrote it: an OpenCLIP name or the path of a JSON file."""
    config: dict[str, Any]
    """OpenCLIP's model configuration: `embed_dim`, `vision_cfg`, `text_cfg` and more."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """Image preprocessing, where a JSON file sets it."""
    from_file: bool = False

    @property
    def is_coca(self) -> bool:
        return "multimodal_cfg" in self.config and bool(self.config.get("custom_text"))

    @property
    def vision_kind(self) -> str:
        """`timm`, `resnet` or `transformer`."""
        vision = self.config["vision_cfg"]
        if vision.get("timm_model_name"):
            return "timm"
        return "resnet" if isinstance(vision.get("layers"), list | tuple) else "transformer"

    @property
    def text_kind(self) -> str:
        """`huggingface` or `transformer`."""
        return "huggingface" if self.config["text_cfg"].get("hf_model_name") else "transformer"


def read_architecture(name: str) -> Architecture:
    """Looks up an OpenCLIP model, or reads a JSON file in OpenCLIP's format.

    Args:
        name: an OpenCLIP name (`ViT-B-32`, `hf-hub:…`, `local-dir:…`) or a path that ends in `.json`. The
            file holds the model configuration itself or, as on the Hugging Face hub, `model_cfg` and
            `preprocess_cfg`.

    Raises:
        ValueError: no such model or file, or the file is not such a configuration.
    """
    if name.startswith(SCHEMES):
        try:
            config = open_clip.get_model_config(name)
        except Exception as error:
            raise ValueError(f"model {name}: OpenCLIP cannot read its configuration: {error}") from error
        return Architecture(name, config or {})
    if name.endswith(".json"):
        return _read_json(Path(name))
    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        known = {m.lower(): m for m in open_clip.list_models()}
        raise ValueError(
            f"model {name!r} is neither an OpenCLIP model nor a path to a .json file."
            f"{_suggestion(name.lower(), known)} All names: {LIST_ALL}"
        )
    return Architecture(name.replace("/", "-"), config)


def _read_json(path: Path) -> Architecture:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model {path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"model {path}: not valid JSON at {where}: {error.msg}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model {path}: expected a JSON object, got {type(content).__name__}")
    config = content.get("model_cfg", content)
    _check_config(path, config)
    return Architecture(str(path), config, preprocess=content.get("preprocess_cfg", {}), from_file=True)


def _check_config(path: Path, config: Any) -> None:
    required = ("embed_dim", "vision_cfg", "text_cfg")
    missing = [key for key in required if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(
            f"model {path}: not an OpenCLIP model configuration, {', '.join(missing)} missing: "
            "expected embed_dim, vision_cfg and text_cfg"
        )
    _check_keys(path, "", config, _TOP_KEYS)
    sections = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    for section, schema in sections.items():
        values = config.get(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"model {path}: {section} must be a JSON object, got {type(values).__name__}")
        _check_keys(path, f"{section}.", values, [f.name for f in fields(schema)])
    if config["text_cfg"].get("embed_cls") and not config.get("custom_text"):
        raise ValueError(f'model {path}: text_cfg.embed_cls needs "custom_text": true beside text_cfg')


def _check_keys(path: Path, section: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in values:
        if key not in known:
            hint = _suggestion(key, {k: k for k in known})
            raise ValueError(f"model {path}: unknown key {section}{key}.{hint} Known: {', '.join(known)}")


def _suggestion(word: str, known: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(word, known, n=4, cutoff=0.5)
    return f" Did you mean {', '.join(known[c] for c in close)}?" if close else ""


def apply_settings(
    arch: Architecture,
    *,
    image_size: int | None = None,
    layer_scale_init: float | None = None,
    patch_dropout: float | None = None,
    qk_norm: bool = False,
    grad_checkpointing: bool = False,
    logit_bias: bool = False,
) -> dict[str, Any]:
    """OpenCLIP's configuration of `arch` with clipq's settings (see `create_model`) written into it.

    Raises:
        ValueError: the model cannot honour a setting.
    """
    config = copy.deepcopy(arch.config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if image_size is not None:
        _check_image_size(arch, image_size)
        vision["image_size"] = image_size
    if layer_scale_init is not None:
        _require_transformers(arch, f"model.layer_scale_init={layer_scale_init}", "null")
        for section in (vision, text, *([config["multimodal_cfg"]] if arch.is_coca else [])):
            section["ls_init_value"] = layer_scale_init
    if patch_dropout is not None:
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"model.patch_dropout={patch_dropout}: expected a share in [0, 1)")
        if arch.vision_kind == "resnet" and patch_dropout > 0:
            raise ValueError(
                f"model.patch_dropout={patch_dropout} with {arch.name}: its image tower is a ResNet, "
                "which has no patches to drop: set model.patch_dropout=null, or choose a ViT"
            )
        vision["patch_dropout"] = patch_dropout
    if qk_norm:
        _require_transformers(arch, "model.qk_norm=true", "false")
        if arch.is_coca:
            raise ValueError(f"model.qk_norm=true with {arch.name}: OpenCLIP's CoCa decoder has no such norm")
        for name, section in (("vision_cfg", vision), ("text_cfg", text)):
            if section.get("scaled_cosine_attn"):
                raise ValueError(f"model.qk_norm=true with {arch.name}: {name} has scaled_cosine_attn; choose one")
            section.update(qk_norm=True, block_type="custom")
    if logit_bias:
        config = {"init_logit_bias": -10.0, "init_logit_scale": math.log(10)} | config
    if grad_checkpointing and arch.vision_kind == "resnet":
        raise ValueError(
            f"model.grad_checkpointing=true with {arch.name}: OpenCLIP's ResNet has no gradient "
            "checkpointing: set it to false, or choose a ViT"
        )
    return config


def _check_image_size(arch: Architecture, image_size: int) -> None:
    # A side that the patches don't fill would lose its last rows of pixels without a word.
    stride = {"transformer": arch.config["vision_cfg"].get("patch_size", 16), "resnet": 32}.get(arch.vision_kind)
    if isinstance(stride, int) and (image_size % stride != 0 or image_size < stride):
        near = max(1, round(image_size / stride)) * stride
        raise ValueError(
            f"model.image_size={image_size} with {arch.name}: expected a multiple of {stride}, such as {near}"
        )


def _require_transformers(arch: Architecture, setting: str, neutral: str) -> None:
    """Raises ValueError unless both towers are OpenCLIP's own transformers."""
    timm = arch.config["vision_cfg"].get("timm_model_name")
    other = {"timm": f"its image tower is the timm model {timm}", "resnet": "its image tower is a ResNet"}
    why = other.get(arch.vision_kind)
    if why is None and arch.text_kind == "huggingface":
        why = f"its text tower is the Hugging Face model {arch.config['text_cfg']['hf_model_name']}"
    if why is not None:
        off = f"{setting.partition('=')[0]}={neutral}"
        raise ValueError(
            f"{setting} with {arch.name}: {why}, which clipq cannot give it: set {off}, or choose a model "
            "of which both towers are OpenCLIP's transformers, such as ViT-B-32"
        )
