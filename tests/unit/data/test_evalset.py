"""Evaluation data: every image once, and no fault unsaid."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipq.data.decode import Captions
from clipq.data.evalset import EvalFaults, EvalShards, EvalStream, ImageFolder, Source
from clipq.data.loader import make_loader
from tests.helpers import COLOURS, colour_samples, encode, picture, write_shard


def mean_colour(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.tensor(image.resize((1, 1)).getpixel((0, 0))).float().view(3, 1, 1)  # pyright: ignore


def read(source: Source, workers: int = 0, ranks: int = 1, batch_size: int = 5) -> tuple[list[tuple], int]:
    """(image as a tuple, target) of every sample, over all ranks, and the number of failures."""
    found, failed = [], 0
    for rank in range(ranks):
        for batch in make_loader(EvalStream(source, mean_colour, batch_size, rank, ranks), workers=workers):
            assert len(batch["image"]) == len(batch["target"]) <= batch_size
            failed += batch["faults"].failed
            found += [(tuple(i.flatten().tolist()), t) for i, t in zip(batch["image"], batch["target"], strict=True)]
    return found, failed


def freeze(found: list[tuple]) -> Counter:
    return Counter((image, tuple(t) if isinstance(t, list) else t) for image, t in found)


@pytest.mark.parametrize(("workers", "ranks"), [(0, 2), (0, 8), (2, 1), (2, 3)])
def test_every_image_once(shards: list[str], workers: int, ranks: int) -> None:
    source = EvalShards(shards, Captions("json.captions").all)
    expected, failed = read(source)
    assert len(expected) == 73
    assert failed == 0
    assert sorted(t[0].split()[1] for _, t in expected) == sorted(str(n) for n in range(73))
    found, failed = read(source, workers, ranks)
    assert freeze(found) == freeze(expected)
    assert failed == 0


def test_labels_and_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = colour_samples(9)
    samples[0]["cls"] = " 2\n"
    samples[1]["cls"] = "cat"
    del samples[2]["cls"]
    del samples[3]["png"]
    samples[4]["png"] = b"no image"
    source = EvalShards([str(write_shard(tmp_path / "0.tar", samples))])
    for workers in (0, 1):
        found, failed = read(source, workers, batch_size=2)
        assert failed == 4
        assert [t for _, t in found] == [2, 1, 2, 3, 0]
        colours = [tuple(mean_colour(picture(list(COLOURS)[n % 4], n)).flatten().tolist()) for n in (0, 5, 6, 7, 8)]
        assert [image for image, _ in found] == colours
    for number, says in ((1, "b'cat' is not a class number"), (2, "no cls"), (3, "no image"), (4, "not an image")):
        line = next(m for m in caplog.messages if f"sample 00000{number} of {tmp_path}/0.tar" in m)
        assert says in line


def test_captions_and_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = colour_samples(4)
    samples[0]["txt"] = "one\ntwo\n"
    samples[1]["txt"] = " \n"
    del samples[2]["png"]
    found, failed = read(EvalShards([str(write_shard(tmp_path / "0.tar", samples))], Captions("txt", lines=True).all))
    assert [t for _, t in found] == [["one", "two"], ["yellow 3"]]
    assert failed == 2
    assert "no text in txt" in caplog.text


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 3), (2, 2)])
def test_broken_shards_are_counted(shards: list[str], workers: int, ranks: int) -> None:
    Path(shards[0]).write_bytes(b"no archive")
    Path(shards[2]).write_bytes(Path(shards[2]).read_bytes()[:8000])
    for source in (EvalShards(shards), EvalShards(shards, Captions("txt").all)):
        streams = [EvalStream(source, mean_colour, 5, rank, ranks) for rank in range(ranks)]
        batches = [batch for s in streams for batch in make_loader(s, workers=workers)]
        faults = EvalFaults.of_all([batch["faults"] for batch in batches])
        assert faults.broken == {shards[0], shards[2]}
        assert faults.metrics()["broken_shards"] == 2
        assert faults.failed <= 1  # the last sample before the cut may lack members
        assert 36 <= sum(len(batch["target"]) for batch in batches) < 53


def test_a_shard_that_breaks_for_one_of_those_who_share_it(shards: list[str]) -> None:
    """A disk may fail for the second lane alone, which then lacks samples that no other lane has."""
    whole = Path(shards[0]).read_bytes()
    faults = EvalFaults()
    for rank in range(2):
        Path(shards[0]).write_bytes(whole[: len(whole) // (1 + rank)])
        for batch in EvalStream(EvalShards(shards[:1]), mean_colour, 5, rank, 2):
            faults.add(batch["faults"])
    assert faults.broken == {shards[0]}


@pytest.mark.parametrize("ranks", [1, 3])
def test_only_faults(tmp_path: Path, ranks: int) -> None:
    source = EvalShards([str(write_shard(tmp_path / "0.tar", [{"png": b"x", "cls": "0"}] * 4))])
    assert read(source, ranks=ranks) == ([], 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, colour in enumerate(sorted(COLOURS)):
        inside = tmp_path / "images" / colour / ("deeper" if label == 2 else "")
        inside.mkdir(parents=True)
        for n in range(label + 1):
            (inside / f"{n}.{'PNG' if n % 2 else 'jpeg'}").write_bytes(encode(picture(colour, n), "PNG"))
        (inside / "notes.txt").write_text("no image")
    (tmp_path / "images" / "README").write_text("no class")
    return tmp_path / "images"


def test_image_folder(folder: Path) -> None:
    source = ImageFolder(str(folder))
    assert [p.name for p in source.classes()] == ["blue", "green", "red", "yellow"]
    expected, failed = read(source)
    assert failed == 0
    assert Counter(t for _, t in expected) == {0: 1, 1: 2, 2: 3, 3: 4}
    assert expected[0][0] == tuple(mean_colour(picture("blue", 0)).flatten().tolist())
    for ranks, workers in itertools.product((1, 3, 12), (0, 1)):
        assert freeze(read(source, workers, ranks)[0]) == freeze(expected)


def test_image_folder_faults(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "blue" / "album.jpg").mkdir()
    (folder / "blue" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "blue" / "empty.png").write_bytes(b"")
    found, failed = read(ImageFolder(str(folder)))
    assert (len(found), failed) == (10, 3)
    for name in ("album.jpg", "gone.png", "empty.png"):
        assert name in caplog.text
    for where in (folder / "blue" / "album.jpg", folder / "nowhere", folder / "README"):
        with pytest.raises(FileNotFoundError, match="one sub-folder of images for each class"):
            ImageFolder(str(where)).classes()
