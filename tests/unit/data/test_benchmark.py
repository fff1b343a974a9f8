"""Data sets in CLIP_benchmark's layout, in a folder and behind a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipq.build_eval import build_evaluators
from clipq.config.checks import ConfigError
from clipq.config.evaluation import EvalConfig, TaskConfig
from clipq.data.benchmark import CLASSIFICATION, CLASSNAMES, RETRIEVAL, BenchmarkSet
from clipq.data.evalset import EvalShards
from clipq.eval.multi_label import MultiLabel
from clipq.eval.retrieval import Retrieval
from clipq.eval.zero_shot import ZeroShot
from tests.helpers import COLOURS, encode, picture, write_shard
from tests.remote_server import Handler, http_server, impatient
from tests.unit.eval.fakes import built, npy


def benchmark_set(folder: Path, *, retrieval: bool = False) -> Path:
    """Two shards of two images."""
    colours = list(COLOURS)[:4]
    for shard in range(2):
        samples = [
            {"__key__": f"s{n}", "png": encode(picture(colours[n], n))}
            | ({"txt": f"{colours[n]}\n\nall {colours[n]}\n"} if retrieval else {"cls": str(n)})
            for n in (2 * shard, 2 * shard + 1)
        ]
        write_shard(folder / "test" / f"{shard}.tar", samples)
    (folder / "test" / "nshards.txt").write_text("2\n")
    if retrieval:
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        (folder / "classnames.txt").write_text("".join(f"{c}\n" for c in colours))
        (folder / "zeroshot_classification_templates.txt").write_text("a {c} photo.\n\nall {c}.\n")
    return folder


def evaluator(**task: str) -> Retrieval | ZeroShot:
    return built(Retrieval | ZeroShot, **task)  # pyright: ignore[reportArgumentType, reportReturnType]


def targets(found: Retrieval | ZeroShot) -> list[object]:
    assert isinstance(found.source, EvalShards)
    return [target for _, _, target in found.source.share(0, 1)]


def test_classification(tmp_path: Path) -> None:
    found = evaluator(benchmark=str(benchmark_set(tmp_path)))
    assert isinstance(found, ZeroShot)
    assert found.classnames == list(COLOURS)[:4]
    assert found.templates == ["a {} photo.", "all {}."]
    assert targets(found) == [0, 1, 2, 3]


def test_retrieval_is_seen_by_itself(tmp_path: Path) -> None:
    found = evaluator(benchmark=str(benchmark_set(tmp_path, retrieval=True)))
    assert isinstance(found, Retrieval)
    assert targets(found) == [[c, f"all {c}"] for c in list(COLOURS)[:4]]


def test_multi_label_is_seen_by_itself(tmp_path: Path) -> None:
    """As CLIP_benchmark's builder writes VOC 2007: float32 of zeros and ones."""
    folder, labels = benchmark_set(tmp_path), [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]
    (folder / "dataset_type.txt").write_text("multilabel\n")
    for shard in range(2):
        samples = [{"png": encode(picture("red", n)), "npy": npy(labels[n])} for n in (2 * shard, 2 * shard + 1)]
        write_shard(folder / "test" / f"{shard}.tar", samples)
    found = built(MultiLabel, benchmark=str(folder))
    assert (found.classnames, found.templates) == (list(COLOURS)[:4], ["a {} photo.", "all {}."])
    assert [target.tolist() for _, _, target in found.source.share(0, 1)] == [[bool(x) for x in row] for row in labels]
    (tmp_path / "some.txt").write_text("red\n")
    for task, says in (
        ({"subsets": {"some": f"{tmp_path}/some.txt"}}, r"subsets: .* is multilabel"),
        ({"max_captions": 5}, r"max_captions=5: .* is no retrieval"),
    ):
        with pytest.raises(ConfigError, match=rf"eval\.tasks\.x\.{says}"):
            build_evaluators(EvalConfig(tasks={"x": TaskConfig(benchmark=str(folder), **task)}))


def test_other_names_and_templates(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    own = {"classnames": f"{tmp_path}/names.txt", "templates": "openclip:simple"}
    found = evaluator(benchmark=str(benchmark_set(tmp_path / "set")), **own)
    assert isinstance(found, ZeroShot)
    assert (found.classnames, len(found.templates)) == (["a", "b", "c", "d"], 7)


def test_behind_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    folder = benchmark_set(tmp_path)
    with http_server(b"") as address:
        root = f"{address}/good"
        for path in folder.rglob("*.*"):
            Handler.files[f"/good/{path.relative_to(folder)}"] = path.read_bytes()
        monkeypatch.setattr(BenchmarkSet, "kind", lambda _: CLASSIFICATION)  # this server has no 404 for one file
        assert targets(evaluator(benchmark=root)) == [0, 1, 2, 3]
        monkeypatch.undo()
        impatient(monkeypatch)
        assert BenchmarkSet(f"{address}/missing").kind() == CLASSIFICATION
        with pytest.raises(FileNotFoundError):
            BenchmarkSet(f"{address}/missing").shards()


def test_pages_of_the_hub_lead_to_their_files() -> None:
    bare = "https://huggingface.co/datasets/clip-benchmark/wds_cifar10"
    files = f"{bare}/resolve/main"
    for root in (bare, f"{bare}/", f"{bare}/tree/main", f"{bare}/tree/main/", files):
        assert BenchmarkSet(root).where("test/0.tar") == f"{files}/test/0.tar"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("test/nshards.txt", None, r"nshards\.txt.*Expected test/nshards\.txt, test/0\.tar … and, for classification"),
        ("test/nshards.txt", "many", r"'many': expected the number of shards"),
        ("classnames.txt", None, r"No such file or directory: '.*classnames\.txt'"),
        ("classnames.txt", "a\n\nb\n", r"classnames\.txt: line 2 is blank"),
        ("classnames.txt", "a\n", r"class 1, but the 1 class names are of classes 0 to 0"),
        ("zeroshot_classification_templates.txt", "a photo.\n", r"template 1, 'a photo\.', has no \{\}"),
        ("dataset_type.txt", "captioning", r"'captioning': expected classification, retrieval, multilabel"),
    ],
)
def test_mistakes(file: str, content: str | None, says: str, tmp_path: Path) -> None:
    folder = benchmark_set(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=says):
        evaluator(benchmark=str(folder))


def test_one_place_for_the_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set exactly one of shards=, folder= and benchmark="):
        EvalConfig(tasks={"x": TaskConfig(benchmark="a", folder="b")})
    assert BenchmarkSet(str(benchmark_set(tmp_path, retrieval=True))).kind() == RETRIEVAL
    assert CLASSNAMES == "classnames.txt"
