"""The built-in data set: pictures of coloured shapes with captions, rendered on first use as webdataset shards.

It needs no download and is small enough for a CPU, yet it asks for what a real data set asks for: pictures vary in
much that their captions don't mention, captions vary in wording, and the test has pictures never seen, some of them
of combinations of colour and shape that neither a training picture nor a training caption shows.

Beneath the cache folder (`CLIPQ_CACHE`, else `$XDG_CACHE_HOME/clipq`, else `~/.cache/clipq`):

    shapes-v1-…/train/00000.tar …      jpg, txt (a caption), json (all captions and what is on the picture)
    shapes-v1-…/test/00000.tar …       the same and cls; one thing on each picture, every class equally often
    shapes-v1-…/classnames.txt  templates.txt  unseen_combinations.txt  README.txt  index.json
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random

from clipq.data.scenes import COLOURS, SHAPES, Scene, describe, draw, sample_scene

VERSION = 1
"""Raise it with every change of what is rendered: users get a new folder, not a mixture."""
CAPTIONS = 4
"""Different captions of each picture, as far as chance gives them."""
PAIRS = 0.1
"""Share of the training pictures that show two things."""
TEMPLATES = (
    "a {}", "the {}", "one {}", "a picture of a {}", "an image of the {}", "there is a {}", "a large {}", "a small {}",
    "a striped {}", "a dotted {}", "a checkered {}", "a plain {}",
)  # fmt: skip
README = """\
Pictures of coloured shapes with English captions, rendered by clipq (clipq/data/synthetic.py).
train/*.tar and test/*.tar are webdataset shards. classnames.txt: line n, from 0, names class n of the cls members.
unseen_combinations.txt: the classes that no training picture and no training caption shows.
This folder can be deleted; it is rendered again when it is needed.
"""


class CacheError(OSError):
    """The built-in data set cannot be written; the message says where and how to mend it."""


def classes() -> list[tuple[str, str]]:
    """(colour, shape) of the 48 classes, in the order of their numbers."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES]


def unseen_combinations() -> list[tuple[str, str]]:
    """The 8 classes left out of training: one of each colour, and of each shape at least one."""
    return [(colour, SHAPES[(5 * i + 2) % len(SHAPES)]) for i, colour in enumerate(COLOURS)]


def cache_dir() -> Path:
    """`CLIPQ_CACHE`, else `$XDG_CACHE_HOME/clipq`, else `~/.cache/clipq`."""
    if own := os.environ.get("CLIPQ_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").expanduser().absolute() / "clipq"


def folder_of(*, train: int = 20000, test_per_class: int = 40, size: int = 48, seed: int = 0) -> Path:
    """Where `ensure` puts what it renders from these arguments."""
    return cache_dir() / f"shapes-v{VERSION}-{train}x{size}px-{test_per_class}-seed{seed}"


def ensure(*, train: int = 20000, test_per_class: int = 40, size: int = 48, seed: int = 0) -> Path:
    """The folder of the data set, rendered now (about 20 s on one core) unless that was done before.

    Pictures and captions are functions of the arguments and `VERSION`, which are part of the folder's name. Any number
    of processes may call this at once: each renders into a folder of its own, the first to finish gives it its name,
    the others take that one.

    Args:
        train: training pictures.
        test_per_class: test pictures of each class.
        size: height and width of the pictures in pixels.
        seed: decides what is on them.

    Raises:
        CacheError: the folder cannot be written.
    """
    folder = folder_of(train=train, test_per_class=test_per_class, size=size, seed=seed)
    if is_complete(folder):
        return folder
    print(f"rendering the built-in data set ({train:,} pictures) into {folder} ...", file=sys.stderr, flush=True)
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        work.chmod(0o755)  # mkdtemp's own is for this user alone; the cache may be shared
        _write(work, train, test_per_class, size, seed)
        _publish(work, folder)
    except OSError as error:
        raise CacheError(
            f"cannot write the built-in data set to {folder}: {error.strerror or error}. It takes about "
            f"{(train + 48 * test_per_class) * 5.5 / 1000:.0f} MB: make room there and see that it can be written, or "
            "set CLIPQ_CACHE to another folder"
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether every file is there in its full length: a folder gets its name when complete, but disks lose files."""
    try:
        files = json.loads((folder / "index.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(work: Path, folder: Path) -> None:
    """Gives the finished folder its name, in one step, unless another process was first."""
    try:
        work.rename(folder)
    except OSError:
        if is_complete(folder):
            return
        if folder.exists():  # damaged: out of the way with it, into the folder that the caller removes
            folder.rename(work.with_name(work.name + ".damaged"))
        try:
            work.rename(folder)
        except OSError:
            if not is_complete(folder):
                raise
        finally:
            shutil.rmtree(work.with_name(work.name + ".damaged"), ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed more than a day ago left behind."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        try:
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # another process removed it


def _write(folder: Path, train: int, test_per_class: int, size: int, seed: int) -> None:
    unseen = unseen_combinations()
    known = [c for c in classes() if c not in unseen]
    _write_split(folder / "train", _train_samples(train, known, size, seed), train, shards=16)
    tests = test_per_class * len(classes())
    _write_split(folder / "test", _test_samples(tests, size, seed), tests, shards=4)
    texts = {
        "classnames.txt": "\n".join(" ".join(c) for c in classes()),
        "unseen_combinations.txt": "\n".join(" ".join(c) for c in unseen),
        "templates.txt": "\n".join(TEMPLATES),
        "README.txt": README.rstrip(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    sizes = {str(p.relative_to(folder).as_posix()): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / "index.json").write_text(json.dumps({"version": VERSION, "files": sizes}, indent=1) + "\n")


def _train_samples(count: int, known: list[tuple[str, str]], size: int, seed: int) -> Iterator[dict[str, bytes]]:
    for number in range(count):
        rng = Random(f"{seed} train {number}")
        yield _members(rng, sample_scene(rng, known, pairs=PAIRS), size)


def _test_samples(count: int, size: int, seed: int) -> Iterator[dict[str, bytes]]:
    for number in range(count):
        rng = Random(f"{seed} test {number}")
        label = number % len(classes())
        scene = sample_scene(rng, [classes()[label]], pairs=0)
        yield {**_members(rng, scene, size), "cls": str(label).encode()}


def _members(rng: Random, scene: Scene, size: int) -> dict[str, bytes]:
    """Member extension -> bytes."""
    captions = list(dict.fromkeys(describe(rng, scene) for _ in range(CAPTIONS)))
    picture = io.BytesIO()
    # Full resolution for colours: at these sizes their subsampling would smear the shapes.
    draw(rng, scene, size).save(picture, "JPEG", quality=92, subsampling=0)
    record = {"captions": captions, "background": scene.background, "things": [asdict(t) for t in scene.things]}
    for thing in record["things"]:
        thing.update({k: round(v, 4) for k, v in thing.items() if isinstance(v, float)})
    return {"jpg": picture.getvalue(), "txt": captions[0].encode(), "json": json.dumps(record).encode()}


def _write_split(folder: Path, samples: Iterator[dict[str, bytes]], count: int, *, shards: int) -> None:
    folder.mkdir()
    shards = min(shards, count)
    number = 0
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            while number < count * (shard + 1) // shards:
                for extension, data in next(samples).items():
                    # The default header has no owner and no time: the same arguments give the same bytes.
                    header = tarfile.TarInfo(f"{number:06d}.{extension}")
                    header.size = len(data)
                    archive.addfile(header, io.BytesIO(data))
                number += 1
