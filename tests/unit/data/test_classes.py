"""Folders and lists of labels that name classes: the right class or a word about it, never another class."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from open_clip import IMAGENET_CLASSNAMES

from clipq.config.checks import ConfigError
from clipq.data.classes import class_numbers, labelled_files, wordnet_ids
from clipq.eval.common import EvalError
from clipq.eval.zero_shot import ZeroShot
from tests.unit.eval.fakes import built, fake_encoder, noise

WNIDS = ["n01440764", "n01443537", "n01498041", "n02123045", "n15075141"]
"""tench, goldfish, stingray, tabby, toilet paper"""
NUMBERS = [0, 1, 6, 281, 999]


def evaluator(**task: object) -> ZeroShot:
    settings = {"classnames": "openclip:imagenet", "templates": "openclip:simple"} | task
    return built(ZeroShot, **settings)


def folders(root: Path, names: list[str]) -> Path:
    """One image in each."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "image.png").write_bytes(noise(number))
    return root


def targets(found: ZeroShot) -> dict[str, object]:
    """Folder or file -> class."""
    samples = [(Path(path), target) for path, _, target in found.source.share(0, 1)]
    return {p.parent.name if p.stem == "image" else p.name: target for p, target in samples}


def lines(root: Path, names: list[str], name: str = "names.txt") -> str:
    (root / name).write_text("".join(f"{n}\n" for n in names))
    return str(root / name)


def test_wordnet_ids_are_in_the_order_of_the_class_names() -> None:
    ids = wordnet_ids()
    assert len(ids) == len(IMAGENET_CLASSNAMES) == 1000
    assert [ids[n] for n in NUMBERS] == WNIDS
    assert [IMAGENET_CLASSNAMES[n] for n in NUMBERS] == ["tench", "goldfish", "stingray", "tabby cat", "toilet paper"]


def test_folders_by_wordnet_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = evaluator(folder=str(folders(tmp_path / "images", WNIDS)), class_ids="imagenet")
    assert targets(found) == dict(zip(WNIDS, NUMBERS, strict=True))
    assert len(found.classnames) == 1000
    assert "only 5 of 1000 classes are there" in caplog.text


def test_only_classes_that_are_there(tmp_path: Path) -> None:
    """Numbers are those of the shorter list, and names stay with their folders."""
    (tmp_path / "images" / "__MACOSX").mkdir(parents=True)
    folder = str(folders(tmp_path / "images", WNIDS[::-1]))
    found = evaluator(folder=folder, class_ids="imagenet", present_only=True)
    assert found.classnames == ["tench", "goldfish", "stingray", "tabby cat", "toilet paper"]
    assert targets(found) == {wnid: number for number, wnid in enumerate(WNIDS)}
    metrics = found.run(fake_encoder()).metrics
    assert (metrics["images"], metrics["chance"]) == (5, 0.2)


@pytest.mark.parametrize("names", [["0", "1", "2", "10", "11", "100"], ["000", "001", "002", "010", "011", "100"]])
def test_folders_by_number(tmp_path: Path, names: list[str]) -> None:
    """ImageNet-V2, as it comes."""
    found = evaluator(folder=str(folders(tmp_path, names)), class_ids="number")
    assert targets(found) == {name: int(name) for name in names}


def test_folders_by_a_list(tmp_path: Path) -> None:
    ids = lines(tmp_path, ["zebra", "ape", "10", "2"], "ids.txt")
    names = lines(tmp_path, ["a zebra", "an ape", "ten", "two"])
    folder = str(folders(tmp_path / "images", ["10", "ape", "zebra"]))
    assert targets(evaluator(folder=folder, class_ids=ids, classnames=names)) == {"zebra": 0, "ape": 1, "10": 2}
    only = evaluator(folder=folder, class_ids=ids, classnames=names, present_only=True)
    assert only.classnames == ["a zebra", "an ape", "ten"]


def test_numbers_in_another_order_are_refused_by_position(tmp_path: Path) -> None:
    folder, names = str(folders(tmp_path / "images", [str(n) for n in range(11)])), lines(tmp_path, ["x"] * 11)
    with pytest.raises(ConfigError, match=r"eval\.tasks\.x\.class_ids=position, .*\(0, 1, 10, …\).*set it to number"):
        evaluator(folder=folder, classnames=names)
    assert class_numbers([f"{n:02}" for n in range(11)], "position", ["x"] * 11) == {f"{n:02}": n for n in range(11)}
    assert class_numbers(["1", "2", "3"], "position", ["x"] * 3) == {"1": 0, "2": 1, "3": 2}


@pytest.mark.parametrize(
    ("names", "ids", "count", "says"),
    [
        (["a", "b"], "position", 3, "2 sub-folders, but 3 class names.*set it to imagenet"),
        (["n01440764"], "number", 1000, "'n01440764' is not a class number; set it to imagenet"),
        (["-1"], "number", 1000, "'-1' is not a class number"),
        (["0", "3"], "number", 3, "3 is not a class number: those of 3 class names are 0 to 2$"),
        (["1", "2", "3"], "number", 3, "Do they count from 1"),
        (["7", "07"], "number", 9, "two of the names are one number"),
        (["n01440764", "cat"], "imagenet", 1000, r"'cat' is not a WordNet id .*\(1 of 2 names are not\)$"),
        (["0", "1"], "imagenet", 1000, "'0' is not a WordNet id.*set it to number"),
        (["n01440764"], "imagenet", 200, "ImageNet has 1000 WordNet ids, but there are 200 class names"),
        (["a"], "nowhere.txt", 1, "no such file; expected position, number, imagenet or a file"),
    ],
)
def test_names_of_no_class(names: list[str], ids: str, count: int, says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        class_numbers(names, ids, ["x"] * count)


def test_positions_that_contradict_names_are_refused(tmp_path: Path) -> None:
    names = ["Green Circle", "red circle", "zebra"]
    folders_in_order = ["green_circle", "red_circle", "zebra"]
    by_position = {name: number for number, name in enumerate(folders_in_order)}
    assert class_numbers(folders_in_order, "position", names) == by_position
    assert class_numbers(["c1", "c2", "c3"], "position", names) == {"c1": 0, "c2": 1, "c3": 2}, "names of another kind"
    assert class_numbers(["x", "y"], "position", ["crane", "crane"]) == {"x": 0, "y": 1}
    assert class_numbers(["a", "crane", "d"], "position", ["b", "crane", "crane"])["crane"] == 1
    with pytest.raises(ValueError, match=r"sub-folder 'green_circle' comes as number 0 .* but class 1 has that name"):
        class_numbers(folders_in_order, "position", ["red circle", "green circle", "zebra"])
    with pytest.raises(ValueError, match=r"'zebra' comes as number 1"):  # the folder of one class has another name
        class_numbers(["a_lion", "zebra", "zoo"], "position", ["ape", "lion", "zebra"])
    listed = lines(tmp_path, ["red circle", "green circle", "zebra"])
    assert class_numbers(folders_in_order, listed, names) == {"green_circle": 1, "red_circle": 0, "zebra": 2}


def test_empty_folders_are_no_classes_to_take_an_image_for(tmp_path: Path) -> None:
    folder, names = folders(tmp_path / "images", ["0", "2"]), lines(tmp_path, ["an ape", "a bear", "a cat"])
    (folder / "1").mkdir()
    (folder / "1" / "._x.png").write_bytes(b"of macOS")
    only = evaluator(folder=str(folder), class_ids="number", classnames=names, present_only=True)
    assert only.classnames == ["an ape", "a cat"]
    assert [target for _, _, target in only.source.share(0, 1)] == [0, 1]


def test_faults_of_a_list(tmp_path: Path) -> None:
    for listed, says in (
        (["a", "b", "a"], "line 3, 'a', is blank or was there before"),
        (["a", "", "b"], "line 2, '', is blank"),
        (["a", "b"], "has 2 names, but there are 3 class names"),
        (["a", "b", "c"], r"'d' is not in .*\(1 of 1"),
    ):
        with pytest.raises(ValueError, match=says):
            class_numbers(["d"], lines(tmp_path, listed), ["x"] * 3)


VAL = [f"ILSVRC2012_val_{n:08}.JPEG" for n in range(1, 6)]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    (tmp_path / "val").mkdir()
    for number, name in enumerate(VAL):
        (tmp_path / "val" / name).write_bytes(noise(number))
    (tmp_path / "val" / "._x.jpeg").write_bytes(b"of macOS")
    return tmp_path / "val"


CLASSES = ["n15075141", "n01440764", "n02123045", "n01440764", "n01443537"]
EXPECTED = dict(zip(VAL, [999, 0, 281, 0, 1], strict=True))


@pytest.mark.parametrize(
    ("ids", "content"),
    [
        ("imagenet", [f"{f} {c}" for f, c in zip(VAL, CLASSES, strict=True)][::-1]),
        ("imagenet", CLASSES),
        ("number", [f"{f}\t{n}" for f, n in EXPECTED.items()]),
        ("number", [str(n) for n in EXPECTED.values()]),
        (
            "imagenet",
            [
                "ImageId,PredictionString",
                *(f"{f[:-5]},{c} 1 2 3 4 n02123045 5 6 7 8 " for f, c in zip(VAL[::-1], CLASSES[::-1], strict=True)),
            ],
        ),
    ],
    ids=["files and ids", "ids", "files and numbers", "numbers", "kaggle"],
)
def test_labels_from_a_file(flat: Path, ids: str, content: list[str]) -> None:
    labels = lines(flat.parent, content)
    found = evaluator(folder=str(flat), labels=labels, class_ids=ids)
    assert targets(found) == EXPECTED
    only = evaluator(folder=str(flat), labels=labels, class_ids=ids, present_only=True)
    assert only.classnames == ["tench", "goldfish", "tabby cat", "toilet paper"]
    assert targets(only) == dict(zip(VAL, [3, 0, 2, 0, 1], strict=True))
    lanes = [sample for lane in range(3) for sample in only.source.share(lane, 3)]
    assert sorted(lanes) == sorted(only.source.share(0, 1))
    assert only.run(fake_encoder()).metrics["images"] == 5


def test_images_that_are_not_there_have_failed(flat: Path) -> None:
    for content in (
        [f"{f} 0" for f in [*VAL, "gone.JPEG"]],
        ["ImageId,PredictionString", *(f"{f[:-5]},n01440764 1 2 3 4" for f in [*VAL, "gone.JPEG"])],
    ):
        ids = "number" if " 0" in content[0] else "imagenet"
        found = evaluator(folder=str(flat), labels=lines(flat.parent, content), class_ids=ids)
        metrics = found.run(fake_encoder()).metrics
        assert (metrics["images"], metrics["failed"]) == (5, 1)
    with pytest.raises(EvalError, match=r"gone.*Check eval\.tasks\.x\.folder and eval\.tasks\.x\.labels"):
        evaluator(folder=str(flat), labels=lines(flat.parent, ["gone.JPEG 0"]), class_ids="number")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (["0"] * 4, "4 lines for 5 images"),
        ([f"{VAL[0]} 0", VAL[1]], rf"line 2, '{VAL[1]}': expected a file name and a class"),
        ([f"{VAL[0]} 0", f"{VAL[0]} 1"], f"{VAL[0]} is there twice"),
        (["ImageId,PredictionString", "ILSVRC2012_val_00000001,"], "line 2: expected ImageId,PredictionString"),
        ([], "the file is empty"),
        (["1000", "1", "2", "3", "4"], "1000 is not a class number.*LOC_val_solution.csv"),
        (["tench", "1", "2", "3", "4"], "'tench' is not a class number"),
    ],
)
def test_faults_of_labels(flat: Path, content: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.tasks\.x\.(labels|class_ids)=.*{says}"):
        evaluator(folder=str(flat), labels=lines(flat.parent, content), class_ids="number")


def test_the_order_of_the_devkit_is_refused(flat: Path) -> None:
    """Its numbers count synsets as meta.mat does: 490 is a sea snake there, class 65."""
    labels = lines(flat.parent, ["490", "361", "171", "822", "297"], "ILSVRC2012_validation_ground_truth.txt")
    with pytest.raises(ConfigError, match=r"labels=.*in an order of its own.*give Kaggle's LOC_val_solution\.csv"):
        evaluator(folder=str(flat), labels=labels, class_ids="number")


def test_file_names_in_doubtful_order(tmp_path: Path) -> None:
    for n in (1, 2, 10):
        (tmp_path / f"img_{n}.png").write_bytes(noise(n))
    with pytest.raises(ValueError, match=r"img_1\.png, img_10\.png … are not in the order of their numbers"):
        labelled_files(lines(tmp_path, ["0", "1", "2"]), str(tmp_path))
    for wrong in (("no.txt", str(tmp_path)), (lines(tmp_path, ["0"]), "nowhere")):
        with pytest.raises(FileNotFoundError, match="no such"):
            labelled_files(*wrong)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"shards": "x.tar", "class_ids": "number"}, r"class_ids=number: it is for kind=zero_shot with folder="),
        ({"shards": "x.tar", "present_only": True}, r"present_only=true: it is for kind=zero_shot with folder="),
        ({"benchmark": "x", "labels": "y"}, r"labels=y: it is for kind=zero_shot with folder="),
        ({"folder": "x", "present_only": True}, r"present_only=true with class_ids=position: .*set class_ids"),
        ({"folder": "x", "labels": "y"}, r"labels=y: set class_ids to what it names classes by"),
        ({"folder": "x", "annotations": "y"}, r"annotations=y: it is for kind=retrieval with folder="),
        ({"folder": "x", "max_captions": 5}, r"max_captions=5: expected 1 or more, of a task of kind=retrieval"),
    ],
)
def test_settings_that_do_not_go_together(task: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.tasks\.x\.{says}"):
        evaluator(**task)
