"""A model whose features are a known function of pixels and words, and an encoder around it."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clipq.build_eval import build_evaluators
from clipq.config.evaluation import EvalConfig, TaskConfig
from clipq.dist.env import DistEnv
from clipq.eval.common import Encoder
from tests.helpers import encode, write_shard

WIDTH, SIDE = 12, 4
ONE_PROCESS = DistEnv(0, 1, 0, 1, torch.device("cpu"))
PROJECTION = np.random.default_rng(5).normal(size=(3 * SIDE * SIDE, WIDTH)).astype(np.float32)


def word_features(text: str) -> np.ndarray:
    """[WIDTH] of a text, not normalised."""
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH).astype(np.float32) * 3


def picture_features(data: bytes) -> np.ndarray:
    """[WIDTH] of an encoded picture, not normalised."""
    pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32)
    return (pixels / 255 - 0.5).transpose(2, 0, 1).ravel() @ PROJECTION


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class FakeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.encoded: list[int] = []
        self.drop = nn.Dropout(0.9)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.drop(images.flatten(1) @ torch.from_numpy(PROJECTION))

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.encoded.append(len(tokens))
        return torch.from_numpy(np.stack([word_features(self.texts[t]) for t in tokens[:, 0].tolist()]))


def to_tensor(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5


def fake_encoder(env: DistEnv = ONE_PROCESS, **options: Any) -> Encoder:
    model = FakeModel()

    def tokenizer(texts: list[str]) -> Tensor:
        model.texts += texts
        return torch.arange(len(model.texts) - len(texts), len(model.texts))[:, None]

    settings = {"batch_size": 7, "workers": 0} | options
    return Encoder(model, tokenizer, to_tensor, (0.5,) * 3, (1.0,) * 3, env, **settings)


def noise(seed: int) -> bytes:
    return encode(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))


def labelled(folder: Path, labels: list[list[int]]) -> list[str]:
    """Shards of pictures of noise with these labels."""
    names, n = [], 0
    for number, of_shard in enumerate(labels):
        samples: list[dict[str, bytes | str]] = []
        for label in of_shard:
            samples.append({"png": noise(n), "cls": str(label), "txt": f"text {n} a\ntext {n} b"})
            n += 1
        names.append(str(write_shard(folder / f"{number}.tar", samples)))
    return names


def npy(labels: Any) -> bytes:
    """The file of an array, as of the classes that an image shows."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(labels, dtype=np.float32))
    return buffer.getvalue()


E = TypeVar("E")


def built(evaluator: type[E], /, **task: Any) -> E:
    """The evaluator of the settings of one task, `x`."""
    (found,), _ = build_evaluators(EvalConfig(tasks={"x": TaskConfig(**task)}))
    assert isinstance(found, evaluator)
    return found
