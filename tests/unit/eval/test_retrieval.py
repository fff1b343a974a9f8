"""Recall against sorting everything, and what must not count as found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clipq.data.decode import Captions
from clipq.data.evalset import EvalShards
from clipq.eval.common import EvalError
from clipq.eval.retrieval import Retrieval, recalls
from tests.helpers import colour_shards, write_shard
from tests.unit.eval.fakes import fake_encoder, labelled, noise, picture_features, unit, word_features


def by_sorting(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Recall from the whole sorted matrix, where nothing ties."""
    scores, out = images @ texts.T, {}
    for k in (1, 5, 10):
        nearest = np.argsort(-scores, 1)[:, :k]
        out[f"image_to_text_r{k}"] = np.mean([i in owner[row] for i, row in enumerate(nearest)])
    for k in (1, 5, 10):
        nearest = np.argsort(-scores.T, 1)[:, :k]
        out[f"text_to_image_r{k}"] = np.mean([owner[t] in row for t, row in enumerate(nearest)])
    return out


@pytest.mark.parametrize("captions", [1, 5, None])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_recalls_are_those_of_sorting(captions: int | None, chunk: int) -> None:
    rng = np.random.default_rng(captions)
    per_image = rng.integers(1, 6, 60) if captions is None else np.full(60, captions)
    owner = rng.permutation(np.arange(60).repeat(per_image))
    images = unit(rng.normal(size=(60, 16)))
    texts = unit(images[owner] + 0.45 * rng.normal(size=(len(owner), 16)))
    found = recalls(torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(owner), chunk=chunk)
    expected = by_sorting(images, texts, owner)
    assert found == pytest.approx(expected, abs=1e-12)
    assert list(found) == list(expected)
    assert 0.1 < expected["image_to_text_r1"] < expected["image_to_text_r10"]


def by_counting(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, k: int) -> tuple[float, float]:
    """Recall where what ties counts as nearer, one image and one text at a time."""
    found = 0
    for i, image in enumerate(images):
        best = max((image @ t for t, o in zip(texts, owner, strict=True) if o == i), default=-np.inf)
        found += sum(image @ t >= best for t, o in zip(texts, owner, strict=True) if o != i) < k
    back = 0
    for t, o in zip(texts, owner, strict=True):
        back += sum(t @ image >= t @ images[o] for i, image in enumerate(images) if i != o) < k
    return found / len(images), back / len(texts)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 3), st.integers(1, 9))
def test_ties_count_as_nearer(data: st.DataObject, count: int, captions: int, chunk: int) -> None:
    """Features of small whole numbers tie often, and their products are exact."""
    few = st.integers(-1, 1)
    images = data.draw(arrays(np.float32, (count, 3), elements=few))
    texts = data.draw(arrays(np.float32, (count * captions, 3), elements=few))
    owner = np.arange(count).repeat(captions)
    found = recalls(*(torch.from_numpy(x) for x in (images, texts, owner)), chunk=chunk)
    for k in (1, 5, 10):
        assert (found[f"image_to_text_r{k}"], found[f"text_to_image_r{k}"]) == by_counting(images, texts, owner, k)


@pytest.mark.parametrize("value", [0.25, 0.0, float("nan")])
def test_a_collapsed_model_finds_nothing(value: float) -> None:
    owner = torch.arange(40).repeat_interleave(2)
    found = recalls(torch.full((40, 16), value), torch.full((80, 16), value), owner)
    assert set(found.values()) == {0.0}


def test_one_pair_is_found() -> None:
    assert set(recalls(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.long)).values()) == {1.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_task(tmp_path: Path, workers: int) -> None:
    shards = labelled(tmp_path, [[0] * 9, [0] * 4, [0] * 7])
    task = Retrieval("t", EvalShards(shards, Captions("txt", lines=True).all), examples=3)
    result = task.run(fake_encoder(workers=workers))
    words = [f"text {n} {x}" for n in range(20) for x in "ab"]
    images, texts = (
        unit(np.stack([picture_features(noise(n)) for n in range(20)])),
        unit(np.stack([word_features(w) for w in words])),
    )
    expected = by_sorting(images, texts, np.arange(20).repeat(2)) | {
        "images": 20,
        "texts": 40,
        "failed": 0,
        "broken_shards": 0,
    }
    assert list(result.metrics) == list(expected)
    assert result.metrics == pytest.approx(expected)
    assert result.kind == "retrieval"
    assert len(result.examples) == 3
    for example in result.examples:
        n = int(example["truth"][0].split()[1])
        assert example["truth"] == [f"text {n} a", f"text {n} b"], "each of them is right"
        scores = images[n] @ texts.T
        best = np.argsort(-scores)[:5]
        assert [w for w, _ in example["best"]] == [words[i] for i in best]
        assert [s for _, s in example["best"]] == pytest.approx(scores[best], abs=1e-5)


def test_faults(tmp_path: Path) -> None:
    samples = [{"png": noise(n) if n != 1 else b"x", "txt": "" if n == 2 else f"text {n}"} for n in range(5)]
    source = EvalShards([str(write_shard(tmp_path / "x.tar", samples))], Captions("txt").all)
    metrics = Retrieval("t", source).run(fake_encoder()).metrics
    assert (metrics["images"], metrics["texts"], metrics["failed"]) == (3, 3, 2)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "x.tar").read_bytes()[:4000])
    source = EvalShards([str(tmp_path / "x.tar"), str(cut)], Captions("txt").all)
    assert Retrieval("t", source).run(fake_encoder()).metrics["broken_shards"] == 1
    source = EvalShards([str(write_shard(tmp_path / "x.tar", samples[1:3]))], Captions("txt").all)
    with pytest.raises(EvalError, match="evaluation t: no image could be read"):
        Retrieval("t", source).run(fake_encoder())


def test_check_finds_a_wrong_caption_field(tmp_path: Path) -> None:
    shards = colour_shards(tmp_path, [4])
    Retrieval("t", EvalShards(shards, Captions("json.captions").all)).check()
    with pytest.raises(EvalError, match=r"evaluation t: .*'nope' is not text.*eval\.tasks\.t\.caption\.field"):
        Retrieval("t", EvalShards(shards, Captions("json.nope").all, settings=("caption.field",))).check()
