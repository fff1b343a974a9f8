"""The built-in data set: what it promises about unseen pictures and combinations, and the cache folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from clipq.data import synthetic
from clipq.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing, describe, draw, sample_scene
from clipq.data.synthetic import CacheError, cache_dir, classes, ensure, unseen_combinations

SMALL = {"train": 300, "test_per_class": 2, "size": 32}


def samples(folder: Path) -> list[dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                found.setdefault(f"{shard.name}/{key}", {})[extension] = file.read()
    return list(found.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ensure(**SMALL)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def train(folder):
    return samples(folder / "train")


@pytest.fixture(scope="module")
def test(folder):
    return samples(folder / "test")


def combinations(sample: dict[str, bytes]) -> list[tuple[str, str]]:
    return [(t["colour"], t["shape"]) for t in json.loads(sample["json"])["things"]]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


# --- what is in it ------------------------------------------------------------------------------------------------


def test_every_sample_is_a_picture_with_its_captions(train, test):
    assert len(train) == 300
    assert len(test) == 2 * 48
    for sample in train + test:
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert (image.mode, image.size) == ("RGB", (32, 32))
        captions = json.loads(sample["json"])["captions"]
        assert sample["txt"].decode() == captions[0]
        assert len(set(captions)) == len(captions) >= 1


def test_every_class_is_tested_equally_often_and_named_by_its_number(folder, test):
    classnames = lines(folder / "classnames.txt")
    assert len(classnames) == len(set(classnames)) == 48
    labels = [int(s["cls"]) for s in test]
    assert [labels.count(n) for n in range(48)] == [2] * 48
    for sample, label in zip(test, labels, strict=True):
        assert [" ".join(c) for c in combinations(sample)] == [classnames[label]]


def test_training_never_shows_or_names_an_unseen_combination(folder, train):
    unseen = lines(folder / "unseen_combinations.txt")
    assert len(unseen) >= 8
    assert set(unseen) < set(lines(folder / "classnames.txt"))
    shown = {" ".join(c) for s in train for c in combinations(s)}
    assert not shown & set(unseen)
    # An attribute may stand between the colour and the shape: "a red striped triangle".
    texture = "|".join(w for before, _ in TEXTURES.values() for w in before)
    for sample in train:
        text = " . ".join(json.loads(sample["json"])["captions"]).lower()
        for name in unseen:
            colour, shape = name.split()
            assert not re.search(rf"\b{colour} (?:(?:{texture}) )?{shape}\b", text), text


def test_every_attribute_of_an_unseen_combination_occurs_in_training_with_others(train):
    shown = [c for s in train for c in combinations(s)]
    for colour, shape in unseen_combinations():
        assert len({s for c, s in shown if c == colour}) >= 4
        assert len({c for c, s in shown if s == shape}) >= 4


def test_no_test_picture_is_a_training_picture(train, test):
    known = {hashlib.sha256(s["jpg"]).digest() for s in train}
    assert len(known) == len(train)
    assert not known & {hashlib.sha256(s["jpg"]).digest() for s in test}


def test_templates_have_a_place_for_the_class(folder):
    templates = lines(folder / "templates.txt")
    assert len(templates) >= 5
    assert all(t.count("{}") == 1 for t in templates)


# --- pictures and captions are true of the scene ------------------------------------------------------------------


def thing(**changes) -> Thing:
    values = {"colour": "red", "shape": "circle", "texture": "plain", "size": "large"}
    return Thing(**{**values, "x": 0.5, "y": 0.5, "radius": 0.4, "angle": 0.0, **changes})


@pytest.mark.parametrize("colour", COLOURS)
def test_the_thing_has_its_colour_where_it_is(colour):
    pixels = np.asarray(draw(Random(0), Scene((thing(colour=colour, x=0.3, radius=0.25),), "grey"), 48))
    hue = Image.fromarray(pixels[20:28, 10:18]).resize((1, 1), Image.Resampling.BOX).convert("HSV").getpixel((0, 0))
    wanted = COLOURS[colour][0]
    assert isinstance(hue, tuple)
    away = abs((hue[0] / 255 * 360 - wanted + 180) % 360 - 180)
    assert away < 12
    saturation = np.ptp(pixels[20:28, 40:47].mean((0, 1)))
    assert saturation < 60, "the background is nearly grey"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_in_what_they_cover(shape):
    from clipq.data.scenes import _shape_mask

    masks = {s: np.asarray(_shape_mask(thing(shape=s), 96)) > 0 for s in SHAPES}
    for other in set(SHAPES) - {shape}:
        common = (masks[shape] & masks[other]).sum() / (masks[shape] | masks[other]).sum()
        assert common < 0.85, (shape, other)


def test_captions_say_what_is_true_and_differ():
    scene = Scene((thing(x=0.25, y=0.75, size="small", texture="striped"),), "dark")
    captions = {describe(Random(i), scene) for i in range(300)}
    assert len(captions) > 60
    text = " ".join(captions).lower()
    for word in ("red", "circle", "striped", "small", "bottom left", "dark background"):
        assert word in text
    wrong = {*SHAPES, *COLOURS, "dotted", "plain", "huge", "right", "top", "light"} - {"red", "circle"}
    assert not wrong & set(re.findall(r"\w+", text))


def test_captions_of_two_things_relate_them_rightly():
    pair = Scene((thing(x=0.25, radius=0.2), thing(colour="blue", shape="star", x=0.75, radius=0.2)), "grey")
    for i in range(300):
        text = describe(Random(i), pair).lower()
        red = re.search(r"red|circle", text)
        blue = re.search(r"blue|star", text)
        assert red is not None
        assert blue is not None
        if "left of" in text or "right of" in text:
            assert ("left of" in text) == (red.start() < blue.start()), text


def test_the_article_agrees():
    scene = Scene((thing(colour="orange"),), "grey")
    captions = [describe(Random(i), scene).lower() for i in range(200)]
    assert any("an orange" in c for c in captions)
    assert not any(re.search(r"\ba [aeio]", c) for c in captions)


def test_things_lie_within_the_picture_and_apart():
    rng = Random(0)
    for _ in range(300):
        scene = sample_scene(rng, classes(), pairs=0.5)
        for t in scene.things:
            assert t.radius - 1e-9 <= t.x <= 1 - t.radius + 1e-9
            assert t.radius - 1e-9 <= t.y <= 1 - t.radius + 1e-9
        assert scene.background in BACKGROUNDS
        if len(scene.things) == 2:
            a, b = scene.things
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= 0.45
        else:
            low, high = SIZES[scene.things[0].size][0]
            assert low <= scene.things[0].radius <= high


# --- determinism --------------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(folder, cache):
    again = ensure(**SMALL)
    assert again != folder
    for path in sorted(folder.rglob("*.tar")):
        assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes()
    other = ensure(**SMALL, seed=1)
    first, second = (samples(f / "test")[0]["jpg"] for f in (folder, other))
    assert first != second


def test_a_change_of_what_is_rendered_raises_the_version(train, test):
    """Users keep a folder as long as its version stands, so a change without a new version would reach only some."""
    records = b"\n".join(s["json"] for s in train + test)
    digests = {1: "0d0d07855276d097"}
    assert digests.get(synthetic.VERSION) == hashlib.sha256(records).hexdigest()[:16], (
        "scenes or captions changed: raise clipq.data.synthetic.VERSION and note the new digest here"
    )


# --- the cache folder ---------------------------------------------------------------------------------------------


def test_the_cache_folder_honours_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLIPQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "clipq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "clipq"
    monkeypatch.setenv("CLIPQ_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_a_complete_folder_is_taken_as_it_is(cache, monkeypatch):
    folder = ensure(train=20, test_per_class=1, size=16)
    monkeypatch.setattr(synthetic, "_write", lambda *a: pytest.fail("rendered again"))
    assert ensure(train=20, test_per_class=1, size=16) == folder


@pytest.mark.parametrize("damage", ["truncated shard", "no index", "no shard", "empty folder"])
def test_a_damaged_folder_is_rendered_again(cache, damage):
    folder = ensure(train=20, test_per_class=1, size=16)
    shard = folder / "train" / "00003.tar"
    whole = shard.read_bytes()
    if damage == "truncated shard":
        shard.write_bytes(whole[:-1024])
    elif damage == "no index":
        (folder / "index.json").unlink()
    elif damage == "no shard":
        shard.unlink()
    else:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert ensure(train=20, test_per_class=1, size=16) == folder
    assert shard.read_bytes() == whole
    assert names(cache) == [folder.name]


def test_a_failed_rendering_leaves_nothing_and_names_the_remedy(cache, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "_write_split", full)
    with pytest.raises(CacheError, match=r"No space left on device.*MB.*CLIPQ_CACHE"):
        ensure(**SMALL)
    assert names(cache) == []


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError, match=r"file/cache.*CLIPQ_CACHE"):
        ensure(**SMALL)


def test_leftovers_of_killed_processes_go_after_a_day(cache):
    folder = ensure(train=20, test_per_class=1, size=16)
    old, young = cache / f".{folder.name}.old", cache / f".{folder.name}.young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    (folder / "index.json").unlink()
    ensure(train=20, test_per_class=1, size=16)
    assert young.exists()
    assert not old.exists()


def test_processes_that_render_at_once_share_one_folder(cache):
    code = "from clipq.data.synthetic import ensure; print(ensure(train=400, test_per_class=2, size=32))"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [(*p.communicate(timeout=120), p.returncode) for p in running]
    assert [code for *_, code in results] == [0, 0, 0], results
    assert len({out for out, *_ in results}) == 1
    folder = Path(results[0][0].strip())
    assert names(cache) == [folder.name]
    assert len(samples(folder / "train")) == 400
