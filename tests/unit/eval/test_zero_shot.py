"""Zero-shot metrics against a plain computation, and the classifier against OpenCLIP's."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from PIL import Image

from clipq.data.evalset import EvalShards
from clipq.eval.common import Encoder, EvalError
from clipq.eval.prompts import prompts, read_templates
from clipq.eval.zero_shot import ZeroShot, build_classifier
from clipq.model.clip import create_model
from tests.helpers import write_shard
from tests.unit.eval.fakes import ONE_PROCESS, fake_encoder, labelled, noise, picture_features, unit, word_features

CLASSES = [f"thing {n}" for n in range(9)]
TEMPLATES = ["{}", "a photo of {}", "{}, {}"]
LABELS = [[0, 1, 2, 4, 5, 6, 8, 8], [0, 0, 4], [5, 6, 1, 1, 2, 2, 8, 6, 0, 4, 4, 4]]  # never 3 or 7
FLAT = [label for shard in LABELS for label in shard]


def expected_metrics(labels: list[int], classes: list[str], subset: list[int]) -> tuple[dict[str, float], np.ndarray]:
    weights = np.stack([unit(np.mean([unit(word_features(p)) for p in prompts(c, TEMPLATES)], 0)) for c in classes])
    scores = unit(np.stack([picture_features(noise(n)) for n in range(len(labels))])) @ weights.T
    order = np.argsort(-scores, axis=1)
    truth = np.array(labels)
    right = order[:, 0] == truth
    of_subset = np.isin(truth, subset)
    metrics = {
        "top1": right.mean(),
        "top5": (order[:, :5] == truth[:, None]).any(1).mean(),
        "mean_per_class": np.mean([right[truth == c].mean() for c in set(labels)]),
        "chance": 1 / len(classes),
        "images": len(labels),
        "failed": 0,
        "broken_shards": 0,
        "some_top1": right[of_subset].mean(),
    }
    return metrics, scores


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 7), (0, 100), (2, 4)])
def test_metrics(tmp_path: Path, workers: int, batch_size: int) -> None:
    shards, subset = labelled(tmp_path, LABELS), [0, 3, 4, 5, 6]
    task = ZeroShot("t", EvalShards(shards), CLASSES, TEMPLATES, {"some": subset}, examples=4)
    result = task.run(fake_encoder(workers=workers, batch_size=batch_size))
    expected, scores = expected_metrics(FLAT, CLASSES, subset)
    assert list(result.metrics) == list(expected)
    assert result.metrics == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["top1"] < expected["top5"] < 1  # or the comparison says little
    assert isinstance(result.metrics["images"], int)
    assert (result.task, result.kind) == ("t", "zero_shot")
    # Each example is one of the images with its own label and its own five best classes.
    assert len(result.examples) == 4
    pictures = [np.asarray(Image.open(io.BytesIO(noise(n)))) for n in range(len(scores))]
    for example in result.examples:
        assert set(example) == {"image", "truth", "best"}
        head, _, content = example["image"].partition(",")
        assert head == "data:image/png;base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        (n,) = (i for i, p in enumerate(pictures) if (p == shown).all())
        assert example["truth"] == CLASSES[FLAT[n]]
        best = np.argsort(-scores[n])[:5]
        assert [name for name, _ in example["best"]] == [CLASSES[c] for c in best]
        assert [score for _, score in example["best"]] == pytest.approx(scores[n][best], abs=1e-5)
    # Classes and pairs of them are counted over all images; mistakes are images of other classes than the best.
    taken = Counter(zip(FLAT, np.argsort(-scores)[:, 0].tolist(), strict=True))
    of_class = Counter(FLAT)
    for number, found in enumerate(result.classes):
        right = taken[number, number] / of_class[number] if of_class[number] else None
        assert found == {"name": CLASSES[number], "images": of_class[number], "top1": pytest.approx(right)}
    confused = {(p["truth"], p["taken_for"]): p["images"] for p in result.confusions}
    assert confused == {(CLASSES[a], CLASSES[b]): n for (a, b), n in taken.items() if a != b}
    assert [p["images"] for p in result.confusions] == sorted(confused.values(), reverse=True)
    assert len(result.mistakes) == 4
    assert all(m["truth"] != m["best"][0][0] for m in result.mistakes)
    # and the same ones each time
    assert task.run(fake_encoder(workers=workers, batch_size=batch_size)).examples == result.examples


@pytest.mark.parametrize("count", [1, 4, 5])
def test_few_classes_have_no_top5(tmp_path: Path, count: int) -> None:
    labels = [[n % count for n in range(11)]]
    task = ZeroShot("t", EvalShards(labelled(tmp_path, labels)), CLASSES[:count], TEMPLATES, examples=2)
    result = task.run(fake_encoder())
    expected, _ = expected_metrics(labels[0], CLASSES[:count], [0])
    assert "top5" not in result.metrics
    assert result.metrics == pytest.approx({k: v for k, v in expected.items() if k not in ("top5", "some_top1")})
    assert all(len(e["best"]) == count for e in result.examples)


@pytest.mark.parametrize("label", [-1, 9, 1000])
def test_label_of_another_data_set(tmp_path: Path, label: int) -> None:
    task = ZeroShot("birds", EvalShards(labelled(tmp_path, [[0, 1, label, 2]])), CLASSES, TEMPLATES)
    encoder = fake_encoder()
    says = f"evaluation birds: an image has class {label}, but the 9 class names are of .*eval.tasks.birds.classnames"
    with pytest.raises(EvalError, match=says):
        task.run(encoder)
    assert encoder.model.training
    with pytest.raises(EvalError, match=says):
        task.check()


def test_check_asks_for_one_good_sample_among_the_first(tmp_path: Path) -> None:
    faulty: list[dict[str, bytes | str]] = [{"png": noise(n)} for n in range(99)]
    good: dict[str, bytes | str] = {"png": noise(99), "cls": "8"}
    for samples, fits in (([*faulty, good], True), ([*faulty, {"png": noise(1)}, good], False), ([], False)):
        shard = str(write_shard(tmp_path / "x.tar", samples))
        task = ZeroShot("t", EvalShards([shard]), CLASSES, TEMPLATES)
        if fits:
            task.check()
            continue
        says = "none of its first 100 samples.*no cls member" if samples else "no samples"
        with pytest.raises(EvalError, match=rf"evaluation t: .*{says}.*eval\.tasks\.t\.shards"):
            task.check()


def test_failed_images_are_counted(tmp_path: Path) -> None:
    samples = [{"png": noise(n) if n % 3 else b"no image", "cls": "1"} for n in range(10)]
    shard = str(write_shard(tmp_path / "x.tar", samples))
    metrics = ZeroShot("t", EvalShards([shard]), CLASSES, TEMPLATES).run(fake_encoder()).metrics
    assert (metrics["images"], metrics["failed"], metrics["broken_shards"]) == (6, 4, 0)


def test_broken_shards_are_counted(tmp_path: Path) -> None:
    shards = labelled(tmp_path, [[0, 1], [1, 2], [2, 3, 4]])
    Path(shards[1]).write_bytes(b"")
    Path(shards[2]).write_bytes(Path(shards[2]).read_bytes()[:4608])
    metrics = ZeroShot("t", EvalShards(shards), CLASSES, TEMPLATES).run(fake_encoder()).metrics
    assert metrics["broken_shards"] == 2
    assert metrics["images"] < 7


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    shard = str(write_shard(tmp_path / "x.tar", [{"png": b"no image", "cls": "1"}]))
    with pytest.raises(ValueError, match="evaluation t: no image could be read"):
        ZeroShot("t", EvalShards([shard]), CLASSES, TEMPLATES).run(fake_encoder())
    shards = labelled(tmp_path, [[0, 1]])
    with pytest.raises(ValueError, match="no image belongs to a class of subset rare"):
        ZeroShot("t", EvalShards(shards), CLASSES, TEMPLATES, {"rare": [3]}).run(fake_encoder())


def test_classifier_is_openclips(arch: Path) -> None:
    """On the same weights, for batches of prompts that do and do not hold all templates of a class."""
    torch.manual_seed(0)
    clip = create_model(str(arch))
    classnames, templates = ["cat", "a {} dog", "tench", "great white shark", "sea"], read_templates("openclip:simple")
    tokenizer, model = clip.tokenizer, clip.model.eval()
    # OpenCLIP formats templates, which would fill the braces of a class name: functions put the name in as it is
    makers = [lambda c, t=t: t.replace("{}", c) for t in templates]
    expected = build_zero_shot_classifier(model, tokenizer, classnames, makers).T
    for batch_size in (1, 7, 20, 64):
        encoder = Encoder(model, tokenizer, lambda image: image, (0.5,), (0.5,), ONE_PROCESS, batch_size=batch_size)  # pyright: ignore
        with encoder.evaluating():
            found = build_classifier(encoder, classnames, templates)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert (expected @ expected.T - torch.eye(5)).abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_classes_with_sentences_of_their_own(batch_size: int) -> None:
    described = {"a": ["one"], "b": ["two", "three", "four"], "c": ["five", "six"]}
    encoder = fake_encoder(batch_size=batch_size)
    with encoder.evaluating():
        found = build_classifier(encoder, list(described), described).numpy()
    expected = np.stack([unit(np.mean([unit(word_features(s)) for s in own], 0)) for own in described.values()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_classifier_is_made_once_where_the_model_stays_as_it_is(tmp_path: Path) -> None:
    shards = labelled(tmp_path, LABELS)
    tasks = [ZeroShot(name, EvalShards(shards), CLASSES, TEMPLATES) for name in ("one", "two")]
    tasks.append(ZeroShot("other", EvalShards(shards), CLASSES, TEMPLATES[:1]))
    for classifiers, times in (({}, (1, 0, 1)), (None, (1, 1, 1))):
        encoder = dataclasses.replace(fake_encoder(), classifiers=classifiers)
        found, encoded = [], []
        for task in tasks:
            encoder.model.encoded.clear()
            found.append(task.run(encoder).metrics)
            encoded.append(int(bool(encoder.model.encoded)))
        assert tuple(encoded) == times
        assert found[0] == found[1]


def test_images_whose_features_are_nan_are_not_of_the_first_class(tmp_path: Path) -> None:
    encoder = fake_encoder()
    encoder.model.encode_image = lambda images: torch.full((len(images), 12), torch.nan)
    metrics = ZeroShot("t", EvalShards(labelled(tmp_path, LABELS)), CLASSES, TEMPLATES).run(encoder).metrics
    assert (metrics["top1"], metrics["top5"], metrics["images"]) == (0, 0, len(FLAT))
