"""Retrieval from the JSON of COCO and of Karpathy: each image and caption, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipq.config.checks import ConfigError
from clipq.config.choices import TaskKind
from clipq.data.captioned import captioned_files
from clipq.eval.common import EvalError
from clipq.eval.retrieval import Retrieval
from tests.unit.eval.fakes import built, fake_encoder, noise


def retrieval(**task: Any) -> Retrieval:
    return built(Retrieval, kind=TaskKind.retrieval, **task)


def images(root: Path, names: list[str]) -> str:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(noise(number))
    return str(root)


def written(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


COCO = {
    "info": {},
    "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 5, "file_name": "c.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": "a one"},
        {"id": 2, "image_id": 9, "caption": "b one\n"},
        {"id": 3, "image_id": 3, "caption": "a two"},
        {"id": 4, "image_id": 9, "caption": " "},
        {"id": 5, "image_id": 5, "caption": "c one"},
        {"id": 6, "image_id": 3, "caption": "a three"},
    ],
}


def test_coco(tmp_path: Path) -> None:
    folder, file = images(tmp_path / "val2014", ["a.jpg", "b.jpg", "c.jpg"]), written(tmp_path / "x.json", COCO)
    found = retrieval(annotations=file, folder=folder)
    samples = {Path(path).name: captions for path, _, captions in found.source.share(0, 1)}
    assert samples == {"b.jpg": ["b one"], "a.jpg": ["a one", "a two", "a three"], "c.jpg": ["c one"]}
    metrics = found.run(fake_encoder()).metrics
    assert (metrics["images"], metrics["texts"], metrics["failed"]) == (3, 5, 0)


def karpathy(counts: dict[str, int], filepath: str | None = None) -> Any:
    found, n = [], 0
    for split, count in counts.items():
        for _ in range(count):
            sentences = [{"raw": f"{n} text {i}", "tokens": []} for i in range(5 + n % 3)]
            place = {} if filepath is None else {"filepath": filepath}
            found.append({"filename": f"{n}.jpg", "split": split, "sentences": sentences, **place})
            n += 1
    return {"images": found, "dataset": "x"}


@pytest.mark.parametrize("filepath", [None, "val2014"])
def test_karpathy(tmp_path: Path, filepath: str | None) -> None:
    file = written(tmp_path / "x.json", karpathy({"train": 4, "test": 6, "val": 3}, filepath))
    folder = images(tmp_path / "images", [f"{filepath or '.'}/{n}.jpg" for n in range(4, 10)])
    found = retrieval(annotations=file, folder=folder)
    for lanes in (1, 4, 9):
        samples = [sample for lane in range(lanes) for sample in found.source.share(lane, lanes)]
        assert sorted(Path(path).stem for path, _, _ in samples) == [str(n) for n in range(4, 10)]
        assert all(t == [f"{Path(p).stem} text {i}" for i in range(5 + int(Path(p).stem) % 3)] for p, _, t in samples)
    metrics = found.run(fake_encoder()).metrics
    assert (metrics["images"], metrics["texts"]) == (6, 6 * 6)
    metrics = retrieval(annotations=file, folder=folder, max_captions=5).run(fake_encoder()).metrics
    assert (metrics["images"], metrics["texts"]) == (6, 6 * 5)
    with pytest.raises(EvalError, match=r"No such file.*Check eval\.tasks\.x\.folder and eval\.tasks\.x\.annotations"):
        retrieval(annotations=file, folder=folder, split="val")


def test_the_first_captions_count(tmp_path: Path) -> None:
    folder, file = images(tmp_path / "val2014", ["a.jpg", "b.jpg", "c.jpg"]), written(tmp_path / "x.json", COCO)
    encoder = fake_encoder()
    result = retrieval(annotations=file, folder=folder, max_captions=2).run(encoder)
    assert result.metrics["texts"] == 4
    assert encoder.model.texts[1:] == ["b one", "a one", "a two", "c one"]  # pyright: ignore


def test_images_without_a_file_or_captions_have_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {**COCO, "annotations": [a for a in COCO["annotations"] if a["image_id"] != 5]}
    folder, file = images(tmp_path / "val2014", ["a.jpg", "c.jpg"]), written(tmp_path / "x.json", content)
    metrics = retrieval(annotations=file, folder=folder).run(fake_encoder()).metrics
    assert (metrics["images"], metrics["texts"], metrics["failed"]) == (1, 3, 2)
    assert "b.jpg" in caplog.text
    assert "c.jpg cannot be evaluated: it has no captions" in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (karpathy({"train": 4, "val": 1}), "no image has split 'test'; it has 4 of train, 1 of val"),
        ({"images": [], "annotations": []}, "it has no images"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}] * 2, "annotations": []}, "two of the images have the same id"),
        ({"images": [{"id": i, "file_name": "a.jpg"} for i in (1, 2)], "annotations": []}, "a.jpg is there twice"),
        ({**COCO, "images": COCO["images"][1:]}, "belongs to image_id 9, which is not among the images"),
        ({"images": [{"id": 1}], "annotations": []}, "expected COCO's captions .*'file_name'"),
        ({"images": [{"split": "test", "filename": "x"}]}, "or Karpathy's .*'sentences'"),
        ([{"image": "x.jpg", "caption": "y"}], "expected COCO's captions"),
        (7, "expected COCO's captions"),
    ],
)
def test_faults(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.tasks\.x\.annotations=.*{says}"):
        retrieval(annotations=written(tmp_path / "x.json", content), folder=str(tmp_path))


def test_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="expected COCO's captions"):
        captioned_files(str(tmp_path / "x.json"), str(tmp_path), "test")
    for wrong in ((str(tmp_path / "no.json"), str(tmp_path)), (str(tmp_path / "x.json"), "nowhere")):
        with pytest.raises(FileNotFoundError, match="no such"):
            captioned_files(*wrong, "test")


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"folder": "x"}, "folder=x with kind=retrieval: set annotations to a JSON file"),
        ({"shards": "x.tar", "annotations": "y"}, "annotations=y: it is for kind=retrieval with folder="),
        ({"shards": "x.tar", "max_captions": 0}, "max_captions=0: expected 1 or more"),
        ({"folder": "x", "annotations": "y", "class_ids": "number"}, "class_ids=number: it is for kind=zero_shot"),
    ],
)
def test_settings_that_do_not_go_together(task: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.tasks\.x\.{says}"):
        retrieval(**task)
