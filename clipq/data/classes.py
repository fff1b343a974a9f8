"""How folders and lists of labels name classes: by number, by WordNet id, by a list of one's own."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipq.data.evalset import IMAGE_SUFFIXES

POSITION, NUMBER, IMAGENET = "position", "number", "imagenet"
DEVKIT = (
    "the devkit's ILSVRC2012_validation_ground_truth.txt counts from 1, in an order of its own that is not that of the "
    "class names: give Kaggle's LOC_val_solution.csv, or a line of file name and WordNet id for each image"
)


def wordnet_ids() -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes, in the order of the class numbers, which is that of the ids."""
    from timm.data.imagenet_info import ImageNetInfo  # open_clip needs timm, which has the list

    return list(ImageNetInfo("imagenet-1k").label_names())


def class_numbers(names: Iterable[str], ids: str, classnames: Sequence[str]) -> dict[str, int]:
    """The class number of each name of a folder, or of a label.

    Args:
        names: as they are written.
        ids: `POSITION` (the n-th in the order of the names, all of which must be there), `NUMBER`, `IMAGENET` (WordNet
            ids), or a file with a name a line, line n naming class n.
        classnames: of the classes, by their numbers.

    Raises:
        ValueError: a name is of no class, or `ids` does not fit the number of classes.
        FileNotFoundError: there is no such file.
    """
    names, count = sorted(set(names)), len(classnames)
    if ids == POSITION:
        return _by_position(names, classnames)
    if ids == NUMBER:
        return _by_number(names, count)
    known = wordnet_ids() if ids == IMAGENET else _listed(ids)
    if len(known) != count:
        of = "ImageNet has 1000 WordNet ids" if ids == IMAGENET else f"{ids} has {len(known)} names"
        raise ValueError(f"{of}, but there are {count} class names")
    numbers = {name: number for number, name in enumerate(known)}
    if ids != IMAGENET:  # folders have underscores where names have spaces, as those that `clipq-data make` reads
        numbers = {name.replace(" ", "_"): number for name, number in numbers.items()} | numbers
    strange = [name for name in names if name not in numbers]
    if strange:
        kind = "a WordNet id of ImageNet's 1000 classes, as n01440764" if ids == IMAGENET else f"in {ids}"
        hint = "; set it to number for class numbers from 0" if all(name.isdecimal() for name in strange) else ""
        raise ValueError(f"{strange[0]!r} is not {kind} ({len(strange)} of {len(names)} names are not){hint}")
    return {name: numbers[name] for name in names}


def _by_position(names: list[str], classnames: Sequence[str]) -> dict[str, int]:
    count = len(classnames)
    # '10' comes before '2': the third folder would be taken for class 2, and every figure would be wrong.
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        first = ", ".join(names[:3])
        raise ValueError(
            f"the sub-folders are numbers, and in the order of their names ({first}, …) class n is not the n-th: set "
            "it to number where they are class numbers from 0, or to a file with their names, line n naming class n"
        )
    if len(names) != count:
        raise ValueError(
            f"there are {len(names)} sub-folders, but {count} class names: class n is the n-th sub-folder. Where only "
            "some of the classes have one, set it to imagenet (WordNet ids), number, or a file with a name a line"
        )
    named = {_plain(name): number for number, name in enumerate(classnames)}
    for number, name in enumerate(names):
        if named.get(_plain(name), number) != number and _plain(classnames[number]) != _plain(name):
            raise ValueError(
                f"sub-folder {name!r} comes as number {number} in the order of names, but class {named[_plain(name)]} "
                "has that name: set it to a file with the names of the folders, line n naming class n"
            )
    return {name: number for number, name in enumerate(names)}


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def _by_number(names: list[str], count: int) -> dict[str, int]:
    wrong = next((name for name in names if not name.isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is not a class number; set it to imagenet for WordNet ids")
    numbers = {name: int(name) for name in names}
    if len(set(numbers.values())) < len(numbers):
        raise ValueError("two of the names are one number, as 7 and 07")
    largest = max(numbers.values())
    if largest >= count:
        from_1 = largest == count and 0 not in numbers.values()
        hint = f". Do they count from 1? If so: {DEVKIT}" if from_1 else ""
        raise ValueError(f"{largest} is not a class number: those of {count} class names are 0 to {count - 1}{hint}")
    return numbers


def _listed(file: str) -> list[str]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such file; expected {POSITION}, {NUMBER}, {IMAGENET} or a file with a name a line")
    names = [name.strip() for name in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    seen = {""}
    for number, name in enumerate(names):
        if name in seen:
            raise ValueError(f"line {number + 1}, {name!r}, is blank or was there before")
        seen.add(name)
    return names


def labelled_files(file: str, folder: str) -> list[tuple[str, str]]:
    """(path, label as it is written) of the images of a folder that a file gives the labels of.

    The file is Kaggle's LOC_val_solution.csv (the WordNet id of the first box counts), or has lines of a path in the
    folder and a label, or of a label alone, in the order of the names of the folder's images.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: its lines are none of these, an image is there twice, or it has more or fewer than there are images.
    """
    path, root = Path(file).expanduser(), Path(folder).expanduser()
    if not path.is_file() or not root.is_dir():
        raise FileNotFoundError(f"{root if path.is_file() else path}: no such {'folder' if path.is_file() else 'file'}")
    if "validation_ground_truth" in path.name:
        raise ValueError(DEVKIT)
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError("the file is empty")
    images = sorted(p.name for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    if lines[0].replace(" ", "").lower() == "imageid,predictionstring":
        pairs = _of_kaggle(lines[1:], images, file)
    elif len(lines[0].split()) == 1:
        pairs = _in_order(lines, images, file)
    else:
        pairs = []
        for number, line in enumerate(lines):
            fields = line.rsplit(maxsplit=1)
            if len(fields) != 2:
                raise ValueError(f"line {number + 1}, {line!r}: expected a file name and a class")
            pairs.append((fields[0], fields[1]))
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{name} is there twice")
        seen.add(name)
    return [(str(root / name), label) for name, label in pairs]


def _of_kaggle(lines: Sequence[str], images: list[str], file: str) -> list[tuple[str, str]]:
    names = {Path(name).stem: name for name in images}
    pairs = []
    for number, row in enumerate(csv.reader(lines)):
        if len(row) != 2 or not row[1].split():
            raise ValueError(f"line {number + 2}: expected ImageId,PredictionString")
        # An image that is not there keeps its name, and fails as any that cannot be read.
        pairs.append((names.get(row[0], f"{row[0]}.JPEG"), row[1].split()[0]))
    return pairs


def _in_order(lines: list[str], images: list[str], file: str) -> list[tuple[str, str]]:
    if len(lines) != len(images):
        raise ValueError(
            f"{len(lines)} lines for {len(images)} images: line n has the class of the n-th image in the order "
            "of their names. With lines of file name and class they may differ"
        )
    if images != sorted(images, key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)]):
        raise ValueError(
            f"which image comes n-th is not sure, for {images[0]}, {images[1]} … are not in the order of their "
            "numbers: give lines of file name and class"
        )
    return list(zip(images, lines, strict=True))
