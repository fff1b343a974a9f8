"""The model as an encoder, results as files and lines, and images kept as examples."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipq.data.evalset import EvalShards
from clipq.eval.common import EvalResult, ExampleKeeper
from clipq.lowp import convert_linears
from clipq.lowp.products import QuantizedWeight
from clipq.lowp.recipe import LinearRecipe
from tests.unit.eval.fakes import fake_encoder, labelled, unit, word_features


def test_texts_are_unit_norm_and_encoded_in_batches() -> None:
    encoder = fake_encoder(batch_size=4)
    words = [f"word {n}" for n in range(10)]
    features = encoder.texts(words)
    assert features.dtype == torch.float32
    np.testing.assert_allclose(features.numpy(), unit(np.stack([word_features(w) for w in words])), atol=1e-6)
    assert encoder.model.encoded == [4, 4, 2]  # pyright: ignore


def test_images_are_unit_norm_in_fp32_under_autocast() -> None:
    seen = []
    for dtype in (None, torch.bfloat16):
        encoder = fake_encoder(autocast=dtype)
        original = encoder.model.encode_image
        encoder.model.encode_image = lambda x, f=original: seen.append(torch.is_autocast_enabled("cpu")) or f(x)  # pyright: ignore
        with encoder.evaluating():
            features = encoder.images(torch.rand(3, 3, 4, 4))
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert seen == [False, True]


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_model_as_it_was(training: bool) -> None:
    encoder = fake_encoder()
    encoder.model.train(training)
    frozen = encoder.model.drop
    for fails in (False, True):
        try:
            with encoder.evaluating():
                assert not encoder.model.training
                assert not frozen.training  # pyright: ignore
                assert not torch.is_grad_enabled()
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert encoder.model.training == frozen.training == training  # pyright: ignore
        assert torch.is_grad_enabled()


def test_low_precision_weights_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Counter()
    for place in (sys.modules["clipq.lowp.convert"], sys.modules["clipq.lowp.linear"]):  # names of functions too
        quantize = place.quantize_weight

        def counted(weight: torch.Tensor, recipe: LinearRecipe, quantize=quantize) -> QuantizedWeight:
            times["quantized"] += 1
            return quantize(weight, recipe)

        monkeypatch.setattr(place, "quantize_weight", counted)
    encoder = fake_encoder()
    encoder.model.tower = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    convert_linears(encoder.model, "switchback")
    x = torch.randn(4, 8)
    with encoder.evaluating():
        once = [encoder.model.tower(x) for _ in range(3)]
    assert times["quantized"] == 2
    with torch.no_grad():
        assert torch.equal(encoder.model.tower(x), once[2])
    assert times["quantized"] == 4, "after it each forward quantizes again: weights may have been trained"


def test_batches_tell_how_far_they_are(tmp_path: Path) -> None:
    told: list[str] = []
    encoder = fake_encoder(status=told.append, batch_size=4)
    source = EvalShards(labelled(tmp_path, [[0] * 10]))
    assert [len(b["target"]) for b in encoder.batches(source, "birds")] == [4, 4, 2]
    assert [t.partition(",")[0] for t in told] == [f"birds: {n} images" for n in (4, 8, 10)]
    assert all(t.endswith(" img/s on this rank") for t in told)


def test_summary_and_files(tmp_path: Path) -> None:
    metrics = {"top1": 0.71, "chance": 0.02, "images": 12_000, "failed": 0, "broken_shards": 2}
    result = EvalResult("shapes", "zero_shot", metrics, [{"image": "x", "truth": "a", "best": [["a", 0.5]]}])
    assert result.summary() == "shapes: top1 71.00%, chance 2.00%, 12,000 images, 2 broken shards"
    probed = {"top1": 1.0, "l2_strength": 0.0316, "images": 7, "train_images": 1_200}
    assert EvalResult("p", "linear_probe", probed).summary() == (
        "p: top1 100.00%, l2_strength 0.0316, 7 images, 1,200 train images"
    )
    for step in (5, 10):
        result.write_examples(tmp_path / "run" / "examples", step)
    assert [p.name for p in (tmp_path / "run" / "examples").iterdir()] == ["shapes.json"]
    assert json.loads((tmp_path / "run" / "examples" / "shapes.json").read_text()) == {
        "task": "shapes",
        "step": 10,
        "kind": "zero_shot",
        "examples": [{"image": "x", "truth": "a", "best": [["a", 0.5]]}],
    }


def images_of(count: int, first: int = 0) -> torch.Tensor:
    """[count, 3, 2, 2]: image n is filled with n / 255."""
    return torch.arange(first, first + count)[:, None, None, None].expand(-1, 3, 2, 2) / 255


@pytest.mark.parametrize(("count", "total"), [(0, 10), (5, 3), (5, 5), (5, 40)])
def test_examples_are_images_with_their_notes(count: int, total: int) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    keeper = ExampleKeeper(count, mean, std)
    normalised = (images_of(total) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for first in range(0, total, 7):
        batch = normalised[first : first + 7].clone()
        keeper.offer(batch, lambda i, first=first: first + i)
        batch.zero_()  # what is kept is a copy
    kept = keeper.kept()
    assert len(kept) == min(count, total)
    for uri, note in kept:
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
        assert shown.shape == (2, 2, 3)
        assert (shown == note).all()
    assert len({note for _, note in kept}) == len(kept)


def test_every_image_is_as_likely_to_be_kept() -> None:
    drawn: Counter[int] = Counter()
    for seed in range(1500):
        keeper = ExampleKeeper(4, (0.0,) * 3, (1.0,) * 3)
        keeper._rng.seed(seed)
        for first in range(0, 20, 6):
            keeper.offer(torch.zeros(min(6, 20 - first), 1), lambda i, first=first: first + i)
        drawn.update(note for _, note in keeper._kept)
    # 300 times each is expected; 5 standard deviations are 77
    assert len(drawn) == 20
    assert all(abs(times - 300) < 77 for times in drawn.values())
