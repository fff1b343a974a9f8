"""The linear probe against plain scikit-learn, on features that are known."""

from __future__ import annotations

import builtins
import itertools
import json
import warnings
from pathlib import Path
from signal import SIGTERM
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from clipq.config.checks import ConfigError
from clipq.config.choices import TaskKind
from clipq.config.evaluation import EvalConfig, TaskConfig
from clipq.data.evalset import EvalShards, ImageFolder
from clipq.dist.env import DistEnv, distributed
from clipq.dist.stop import Stop, Stopped
from clipq.eval.common import EvalError, EvalResult
from clipq.eval.linear_probe import LinearProbe, fit, held_out, search_strength
from clipq.model.clip import create_model
from clipq.model.weights import save_weights
from tests.helpers import COLOURS, command, encode, picture, run_distributed, write_shard
from tests.unit.eval.fakes import ONE_PROCESS, SIDE, built, fake_encoder, noise, picture_features, unit

CLASSES = 7


def tinted(label: int, seed: int, tint: int = 12) -> bytes:
    """Noise over a pattern of the class."""
    pattern = np.random.default_rng([label]).choice([-1, 1], (SIDE, SIDE, 3))
    pixels = 128 + tint * pattern + np.random.default_rng(seed).normal(0, 25, (SIDE, SIDE, 3))
    return encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def labels_of(count: int, seed: int) -> list[int]:
    return [*range(CLASSES), *np.random.default_rng(seed).integers(0, CLASSES, count - CLASSES).tolist()]


def shards(folder: Path, labels: list[int], first: int, tint: int = 12) -> list[str]:
    """Pictures with these labels in shards of unequal length."""
    samples = [{"png": tinted(label, first + n, tint), "cls": str(label)} for n, label in enumerate(labels)]
    bounds = [len(samples) * k * k // 9 for k in range(4)]
    return [str(write_shard(folder / f"{k}.tar", samples[a:b])) for k, (a, b) in enumerate(itertools.pairwise(bounds))]


def probe(folder: Path, train: list[int], test: list[int], *, tint: int = 12) -> LinearProbe:
    return LinearProbe(
        "p",
        EvalShards(shards(folder / "train", train, 0, tint=tint)),
        EvalShards(shards(folder / "test", test, 10_000, tint=tint)),
    )


def features(labels: list[int], first: int) -> np.ndarray:
    return unit(np.stack([picture_features(tinted(label, first + n)) for n, label in enumerate(labels)]))


@pytest.mark.parametrize("workers", [0, 2])
def test_metrics_are_those_of_scikit_learn_at_the_strength(tmp_path: Path, workers: int) -> None:
    train, test = labels_of(150, 1), labels_of(90, 2)
    result = probe(tmp_path, train, test).run(fake_encoder(workers=workers))
    found = result.metrics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=1 / found["l2_strength"], tol=1e-9, max_iter=20_000).fit(features(train, 0), train)
    scores, truth = model.decision_function(features(test, 10_000)), np.array(test)
    right = scores.argmax(1) == truth
    expected = {
        "top1": right.mean(),
        "top5": (np.argsort(-scores, 1)[:, :5] == truth[:, None]).any(1).mean(),
        "mean_per_class": np.mean([right[truth == c].mean() for c in range(CLASSES)]),
        "chance": 1 / CLASSES,
    }
    assert list(found) == [*expected, "l2_strength", "images", "train_images", "failed", "broken_shards"]
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    assert 1 / CLASSES < found["top1"] < found["top5"] < 1  # or the comparison says little
    assert [found[k] for k in ("images", "train_images", "failed", "broken_shards")] == [90, 150, 0, 0]
    assert (result.task, result.kind, result.examples) == ("p", "linear_probe", [])


def test_separable_classes_and_random_labels(tmp_path: Path) -> None:
    train, test = [n % 3 for n in range(60)], [n % 3 for n in range(30)]
    found = probe(tmp_path / "far", train, test, tint=60).run(fake_encoder()).metrics
    assert (found["top1"], found["mean_per_class"]) == (1, 1)
    assert "top5" not in found
    mixed = probe(tmp_path / "mixed", train, test, tint=60)
    samples = [{"png": tinted(n % 3, n, 60), "cls": str(n // 3 % 3)} for n in range(60)]  # each class has all patterns
    mixed.train = EvalShards([str(write_shard(tmp_path / "x.tar", samples))])
    assert mixed.run(fake_encoder()).metrics["top1"] == pytest.approx(1 / 3, abs=0.2)


def test_many_classes_are_fitted_to_their_end() -> None:
    """scikit-learn's own tolerance ends before."""
    rng, labels = np.random.default_rng(3), np.arange(240) % 60
    x = unit(unit(rng.normal(size=(60, 32)))[labels] + 0.15 * rng.normal(size=(240, 32)))
    found, usual = fit(x, labels, 0.01).coef_, LogisticRegression(C=100).fit(x, labels).coef_
    exact = LogisticRegression(C=100, tol=1e-10, max_iter=5000).fit(x, labels).coef_
    assert np.abs(found - exact).max() < 2e-3 * np.abs(exact).max()
    assert np.abs(usual - exact).max() > 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("peak", [-6.0, -2.125, 0.0, 0.375, 3.5, 6.0])
def test_search_finds_the_peak(peak: float) -> None:
    tried = []

    def score(strength: float) -> float:
        tried.append(strength)
        return -abs(np.log10(strength) - peak)

    assert search_strength(score) == pytest.approx(10**peak)
    assert len(tried) == len(set(tried)) <= 15
    assert tried[:7] == pytest.approx([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6])


def test_search_prefers_the_stronger_of_equals() -> None:
    assert search_strength(lambda strength: -abs(round(np.log10(strength / 100) / 4))) == pytest.approx(1e4)


def test_held_out_images_are_a_fifth_of_each_class() -> None:
    labels = np.random.default_rng(3).permutation(np.repeat([0, 4, 7, 9], [50, 11, 2, 1]))
    chosen = held_out(labels)
    assert [int(chosen[labels == c].sum()) for c in (0, 4, 7, 9)] == [10, 2, 1, 0]
    assert (held_out(labels) == chosen).all()


def test_faults_of_both_sources_are_counted(tmp_path: Path) -> None:
    train, test = ([n % 2 for n in range(20)] for _ in range(2))
    found = probe(tmp_path, train, test)
    extra = write_shard(tmp_path / "x.tar", [{"png": b"no image", "cls": "1"}, {"png": noise(1)}])
    (tmp_path / "cut.tar").write_bytes(extra.read_bytes()[:700])
    assert isinstance(found.train, EvalShards)
    assert isinstance(found.source, EvalShards)
    found.train = EvalShards([*found.train.shards, str(extra)])
    found.source = EvalShards([*found.source.shards, str(extra), str(tmp_path / "cut.tar")])
    metrics = found.run(fake_encoder()).metrics
    assert [metrics[k] for k in ("images", "train_images", "failed", "broken_shards")] == [20, 20, 4, 1]


def test_what_cannot_be_probed(tmp_path: Path) -> None:
    for number, (train, test, says) in enumerate(
        (
            ([0, 1, 0, 1], [0, 1, 5], "a test image has class 5, which no training image has"),
            ([3, 3, 3], [3], "all training images have class 3: expected 2 or more"),
            ([0, 1, 2], [0], "no class has two training images"),
        )
    ):
        with pytest.raises(EvalError, match=f"evaluation p: {says}"):
            probe(tmp_path / str(number), train, test).run(fake_encoder())
    found = probe(tmp_path, [0, 1, 0, 1], [0, 1])
    encoder = fake_encoder()
    encoder.model.encode_image = lambda images: images.flatten(1) * float("nan")  # pyright: ignore
    with pytest.raises(EvalError, match="evaluation p: features of training images are NaN or infinite"):
        found.run(encoder)
    found.source = EvalShards([str(write_shard(tmp_path / "x.tar", [{"png": b"x", "cls": "1"}]))])
    with pytest.raises(EvalError, match="evaluation p: no test image could be read"):
        found.run(fake_encoder())


def test_equal_features_are_no_fault(tmp_path: Path) -> None:
    encoder = fake_encoder()
    encoder.model.encode_image = lambda images: images.flatten(1) * 0 + 1  # pyright: ignore
    assert probe(tmp_path, [0, 0, 0, 1], [0, 1]).run(encoder).metrics["top1"] == 0.5


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe(tmp_path, [0, 1], [0, 1])
    found.check()
    bare = EvalShards([str(write_shard(tmp_path / "x.tar", [{"png": noise(1)}]))])
    with pytest.raises(EvalError, match=r"evaluation p, training data: .*no cls member.*eval\.tasks\.p\.train_shards"):
        LinearProbe("p", bare, found.source).check()
    with pytest.raises(EvalError, match=r"evaluation p, test data: .*no cls member.*eval\.tasks\.p\.shards"):
        LinearProbe("p", found.train, bare).check()
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EvalError, match=r"takes scikit-learn .*pip install 'clipq\[probe\]'"):
        found.check()


def test_a_signal_ends_it_between_two_fits(tmp_path: Path) -> None:
    stop, told = Stop(), []

    def status(text: str) -> None:
        told.append(text)
        if "fit 3 of at most 16, L2 strength 100, 20 training images" in text:
            stop.asked = SIGTERM

    with pytest.raises(Stopped):
        probe(tmp_path, [n % 2 for n in range(20)], [0, 1]).run(fake_encoder(stop=stop, status=status))
    assert "fit 3" in told[-1]


def results(folder: Path, env: DistEnv) -> dict[str, EvalResult]:
    """Of more shards than ranks, and of a single one."""
    train, test = sorted(map(str, (folder / "train").iterdir())), sorted(map(str, (folder / "test").iterdir()))
    of = {"many": (train, test), "few": (train[-1:], test[-1:])}
    return {k: LinearProbe(k, EvalShards(a), EvalShards(b)).run(fake_encoder(env)) for k, (a, b) in of.items()}


def on_every_rank(folder: str) -> None:
    expected = json.loads((Path(folder) / "expected.json").read_text())
    with distributed("cpu") as env:
        for name, result in results(Path(folder), env).items():
            assert result.metrics == pytest.approx(expected[name], abs=1e-12), (env.rank, name)
        strange = EvalShards([str(Path(folder) / "strange.tar")])
        train = EvalShards(sorted(map(str, (Path(folder) / "train").iterdir())))
        with pytest.raises(EvalError, match="a test image has class 12, which no"):
            LinearProbe("strange", train, strange).run(fake_encoder(env))
        stop = Stop()

        def status(text: str) -> None:
            if env.rank == 1 and "fit 2" in text:
                stop.asked = SIGTERM

        with pytest.raises(Stopped):  # one rank is asked, and both end
            LinearProbe("stop", train, train).run(fake_encoder(env, stop=stop, status=status))
        env.barrier()


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    probe(tmp_path, labels_of(120, 1), labels_of(60, 2))
    last = [{"png": noise(n), "cls": str(12 if n == 1 else 0)} for n in range(6)]
    write_shard(tmp_path / "strange.tar", last)
    expected = {k: v.metrics for k, v in results(tmp_path, ONE_PROCESS).items()}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    run_distributed(on_every_rank, 2, str(tmp_path))


def build(**task: Any) -> LinearProbe:
    return built(LinearProbe, kind=TaskKind.linear_probe, **task)


def class_folder(folder: Path, names: list[str]) -> str:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(noise(number))
    return str(folder)


def test_sources_of_a_configuration(tmp_path: Path) -> None:
    names = shards(tmp_path / "a", [0, 1, 0, 1], 0)
    folder = class_folder(tmp_path / "b", ["cat", "dog"])
    found = build(train_shards=names, folder=folder)
    assert (found.train, found.source) == (EvalShards(names), ImageFolder(folder))
    assert build(train_folder=folder, folder=class_folder(tmp_path / "c", ["cat", "dog"])).train == ImageFolder(folder)
    other = class_folder(tmp_path / "d", ["ant", "cat", "dog"])
    with pytest.raises(ConfigError, match=r"x: .* same sub-folders, a class each; 'ant' is in the second only"):
        build(train_folder=folder, folder=other)


def test_splits_of_a_benchmark(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_shard(tmp_path / split / "0.tar", [{"png": noise(n), "cls": str(n)} for n in range(2)])
        (tmp_path / split / "nshards.txt").write_text("1\n")
    found = build(benchmark=str(tmp_path))
    assert found.train == EvalShards([str(tmp_path / "train" / "0.tar")])
    assert found.source == EvalShards([str(tmp_path / "test" / "0.tar")])
    with pytest.raises(ConfigError, match=r"nshards\.txt.*Expected nshards.txt, 0.tar … in both valid and test"):
        build(benchmark=str(tmp_path), train_split="valid")
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    with pytest.raises(ConfigError, match="is a set for retrieval"):
        build(benchmark=str(tmp_path))


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"shards": "a.tar"}, "set exactly one of train_shards= and train_folder="),
        ({"shards": "a.tar", "train_shards": "b.tar", "train_folder": "c"}, "set exactly one of train_shards="),
        ({"shards": "a.tar", "train_shards": 3}, r"eval\.tasks\.x\.train_shards=3: expected a path"),
        ({"benchmark": "a", "train_shards": "b.tar"}, r"train_shards with .*benchmark: set .*train_split"),
        ({"benchmark": "a", "train_split": "test"}, "the split that the probe is tested on"),
        ({"shards": "a.tar", "train_shards": "b.tar", "subsets": {"a": "b"}}, r"subsets: they are for zero_shot"),
    ],
)
def test_mistakes(task: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(**task)


def test_training_data_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"train_shards with eval\.tasks\.x\.kind=zero_shot: it is for linear_probe"):
        EvalConfig(tasks={"x": TaskConfig(shards="a.tar", train_shards="b.tar")})


def test_the_command(tmp_path: Path, arch: Path) -> None:
    """A model that is not trained tells colours apart."""
    colours = list(COLOURS)
    for split, count in (("train", 48), ("test", 24)):
        samples = [{"png": encode(picture(colours[n % 4], n + count)), "cls": str(n % 4)} for n in range(count)]
        write_shard(tmp_path / f"{split}.tar", samples)
    save_weights(create_model(str(arch)).model, tmp_path / "w.safetensors")
    done = command(
        "eval",
        *("checkpoint=w.safetensors", "model=vit_s_8_64", f"model.name={arch}", "device=cpu", "backend=fp32"),
        "eval=linear_probe",
        *("eval.tasks.linear_probe.train_shards=train.tar", "eval.tasks.linear_probe.shards=test.tar"),
        cwd=tmp_path,
    )
    table = {row[1]: row[2] for line in done.stdout.splitlines() if len(row := line.split()) == 3}
    assert (table["top1"], table["images"], table["train_images"]) == ("100.00%", "24", "48")
    assert float(table["l2_strength"]) > 0
