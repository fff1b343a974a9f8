"""Tiny models of every kind, built by OpenCLIP alone and by clipq, with the same weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from torch import Tensor, nn

from clipq.model.clip import ClipModel, create_model
from clipq.model.weights import load_openclip

VOCABULARY, CONTEXT, IMAGE, EOS = 64, 10, 32, 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_config(vision: dict | None = None, text: dict | None = None, **top: Any) -> dict[str, Any]:
    """An OpenCLIP configuration of about 50 k parameters; the arguments overwrite parts of it."""
    vision_cfg = {"image_size": IMAGE, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
    text_cfg = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 2}
    return {
        "embed_dim": 20,
        "vision_cfg": {**vision_cfg, **(vision or {})},
        "text_cfg": {**text_cfg, **(text or {})},
        **top,
    }


def build_openclip(config: dict[str, Any]) -> nn.Module:
    """OpenCLIP's model with every parameter moved away from its initial value: gains of 1 and zeros hide errors."""
    config = copy.deepcopy(config)
    custom = config.pop("custom_text", False)
    if "multimodal_cfg" in config:
        model = CoCa(**config)
    else:
        model = (CustomTextCLIP if custom else CLIP)(**config, output_dict=True)
    return shake(model)


def shake(model: nn.Module, std: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


def random_batch(batch: int = 3, image: int = IMAGE, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """Images, and texts of all lengths: words, an end token (2, then the largest number), padding."""
    text = torch.zeros(batch, context, dtype=torch.long)
    for row in text:
        length = int(torch.randint(2, context - 1, ()))
        row[:length] = torch.randint(3, VOCABULARY - 1, (length,))
        row[length - 1], row[length] = EOS, VOCABULARY - 1
    return torch.randn(batch, 3, image, image), text


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def write(config: dict[str, Any]) -> str:
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(config))
        return str(path)

    return write


@pytest.fixture
def pair(write_config: Callable) -> Callable[..., tuple[nn.Module, ClipModel]]:
    """config -> (OpenCLIP's model, clipq's with the same weights), both in evaluation mode."""

    def build(config: dict[str, Any], **settings: Any) -> tuple[nn.Module, ClipModel]:
        theirs = build_openclip(config)
        bundle = create_model(write_config(config), **settings)
        load_openclip(bundle.model, theirs.state_dict())
        theirs.eval()
        bundle.model.eval()
        return theirs, bundle

    return build


@pytest.fixture
def tiny() -> Callable[..., dict[str, Any]]:
    return tiny_config


@pytest.fixture
def openclip_model() -> Callable[[dict[str, Any]], nn.Module]:
    return build_openclip


@pytest.fixture
def batch() -> Callable[..., tuple[Tensor, Tensor]]:
    return random_batch
