"""Average precision against its definition, a threshold at a time, and what must not count as found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clipq.build_eval import build_evaluators
from clipq.config.checks import ConfigError
from clipq.config.choices import TaskKind
from clipq.config.evaluation import EvalConfig, TaskConfig
from clipq.data.evalset import EvalShards, labels_of
from clipq.eval.common import EvalError
from clipq.eval.multi_label import MultiLabel, average_precisions
from clipq.eval.prompts import prompts
from tests.helpers import write_shard
from tests.unit.eval.fakes import fake_encoder, noise, npy, picture_features, unit, word_features

CLASSES = [f"thing {n}" for n in range(5)]
TEMPLATES = ["{}", "a photo of {}"]


def by_thresholds(scores: np.ndarray, truth: np.ndarray) -> float:
    """Precision at each threshold, weighted by the recall that it adds: scikit-learn's definition."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = truth[taken].sum() / truth.sum()
        total += (recall - before) * truth[taken].mean()
        before = recall
    return total


@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_average_precision(n: int, share: float) -> None:
    rng = np.random.default_rng(n)
    scores, truth = rng.normal(size=(n, 6)).astype(np.float32), rng.random((n, 6)) < share
    truth[0, :5], truth[:, 5] = True, False
    found = average_precisions(torch.from_numpy(scores), torch.from_numpy(truth))
    assert found.dtype == torch.float64
    assert found[:5].tolist() == pytest.approx([by_thresholds(scores[:, c], truth[:, c]) for c in range(5)], abs=1e-12)
    assert found[5].isnan()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 12))
def test_ties_in_any_order(data: st.DataObject, n: int) -> None:
    scores = data.draw(arrays(np.float32, (n, 2), elements=st.integers(-1, 2)))
    truth = data.draw(arrays(np.bool_, (n, 2)))
    truth[0] = True
    found = average_precisions(torch.from_numpy(scores), torch.from_numpy(truth))
    assert found.tolist() == pytest.approx([by_thresholds(scores[:, c], truth[:, c]) for c in range(2)], abs=1e-12)
    order = np.random.default_rng(0).permutation(n)
    assert average_precisions(*(torch.from_numpy(x[order]) for x in (scores, truth))).tolist() == found.tolist()


def test_by_hand() -> None:
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    assert average_precisions(scores, torch.tensor([[1], [0], [1], [0]]).bool()).item() == (1 / 1 + 2 / 3) / 2
    assert average_precisions(scores, torch.tensor([[0], [0], [0], [1]]).bool()).item() == 1 / 4


@pytest.mark.parametrize("value", [0.25, 0.0, float("nan")])
def test_a_collapsed_model_is_at_chance(value: float) -> None:
    truth = torch.arange(40).remainder(4).eq(0)[:, None]
    assert average_precisions(torch.full((40, 1), value), truth).item() == 0.25


def shard(folder: Path, labels: np.ndarray) -> str:
    samples = [{"png": noise(n), "npy": npy(row)} for n, row in enumerate(labels)]
    return str(write_shard(folder / "x.tar", samples))


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 7), (2, 4)])
def test_task(tmp_path: Path, workers: int, batch_size: int) -> None:
    labels = np.random.default_rng(0).random((20, 5)) < 0.4
    labels[:, 3] = False  # counts for nothing
    source = EvalShards([shard(tmp_path, labels)], labels_of)
    result = MultiLabel("t", source, CLASSES, TEMPLATES, examples=3).run(
        fake_encoder(workers=workers, batch_size=batch_size)
    )
    weights = np.stack([unit(np.mean([unit(word_features(p)) for p in prompts(c, TEMPLATES)], 0)) for c in CLASSES])
    scores = unit(np.stack([picture_features(noise(n)) for n in range(20)])) @ weights.T
    occur = [0, 1, 2, 4]
    expected = {
        "mean_average_precision": np.mean([by_thresholds(scores[:, c], labels[:, c]) for c in occur]),
        "chance": labels[:, occur].mean(),
        "images": 20,
        "failed": 0,
        "broken_shards": 0,
    }
    assert list(result.metrics) == list(expected)
    assert result.metrics == pytest.approx(expected, abs=1e-6)
    assert result.kind == "multi_label"
    assert len(result.examples) == 3
    for example in result.examples:
        assert example["truth"] in [[c for c, there in zip(CLASSES, row, strict=True) if there] for row in labels]
        assert len(example["best"]) == 5


def test_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = npy([1, 0, 0, 1, 0])
    bad = [b"no array", npy([[1, 0]]), npy([0.5] * 5), npy([float("nan")] * 5), good[:-4], b""]
    samples: list[dict[str, bytes | str]] = [{"png": noise(n), "npy": x} for n, x in enumerate([good, *bad])]
    samples.append({"png": noise(9), "cls": "1"})
    source = EvalShards([str(write_shard(tmp_path / "x.tar", samples))], labels_of)
    task = MultiLabel("t", source, CLASSES, TEMPLATES)
    task.check()
    metrics = task.run(fake_encoder()).metrics
    assert (metrics["images"], metrics["failed"]) == (1, len(bad) + 1)
    for says in ("cannot be read", "is not a 0 or 1 for each class", "no npy member"):
        assert says in caplog.text
    source = EvalShards([shard(tmp_path, np.zeros((3, 5)))], labels_of)
    with pytest.raises(EvalError, match="evaluation t: no image shows any class"):
        MultiLabel("t", source, CLASSES, TEMPLATES).run(fake_encoder())


def test_labels_of_another_data_set(tmp_path: Path) -> None:
    task = MultiLabel("t", EvalShards([shard(tmp_path, np.ones((3, 4)))], labels_of), CLASSES, TEMPLATES)
    for use in (task.check, lambda: task.run(fake_encoder())):
        with pytest.raises(EvalError, match=r"labels of 4 classes, but there are 5 .*eval\.tasks\.t\.classnames"):
            use()
    task = MultiLabel("t", EvalShards([shard(tmp_path, np.ones((3, 4)))]), CLASSES, TEMPLATES)
    with pytest.raises(EvalError, match=r"no cls member. Check eval\.tasks\.t\.image and eval\.tasks\.t\.shards"):
        task.check()


def test_settings(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"{c}\n" for c in CLASSES))
    names: dict = {
        "kind": TaskKind.multi_label,
        "classnames": str(tmp_path / "names.txt"),
        "templates": "openclip:simple",
    }
    task = TaskConfig(shards=shard(tmp_path, np.ones((3, 5))), **names)
    (found,), _ = build_evaluators(EvalConfig(tasks={"x": task}))
    assert isinstance(found, MultiLabel)
    for more, says in (
        ({"folder": "x"}, r"folder=x with kind=multi_label"),
        ({"shards": "x", "subsets": {"a": "b"}}, r"subsets: kind=multi_label"),
        ({"shards": "x", "max_captions": 1}, r"max_captions=1: "),
        ({"shards": "x", "class_ids": "number"}, r"class_ids=number: it is for kind=zero_shot"),
    ):
        with pytest.raises(ConfigError, match=rf"eval\.tasks\.x\.{says}"):
            EvalConfig(tasks={"x": TaskConfig(**names, **more)})
