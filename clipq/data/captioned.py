"""Captions of image files from the JSON that retrieval is measured on: COCO's own, and Karpathy's splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


def captioned_files(file: str, folder: str, split: str) -> list[tuple[str, list[str] | ValueError]]:
    """(path, captions) of each image, in the order of the file; of one without captions a ValueError in their place.

    Captions are in the order of the file, without blanks around them and without blank ones.

    Args:
        file: COCO's form (`images`, `annotations`: captions_val2014.json), all of whose images count; or Karpathy's
            (`images` with `sentences`: dataset_coco.json, dataset_flickr30k.json).
        folder: what the names of the images are relative to; Karpathy's `filepath` is part of a name.
        split: of Karpathy's form: which images count.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is of neither form, or has no images of this split.
    """
    path, root = Path(file).expanduser(), Path(folder).expanduser()
    if not path.is_file() or not root.is_dir():
        raise FileNotFoundError(f"{root if path.is_file() else path}: no such {'folder' if path.is_file() else 'file'}")
    forms = "expected COCO's captions (images, annotations) or Karpathy's (images with split and sentences)"
    try:
        content: Any = json.loads(path.read_bytes())
        found = _of_coco(content) if "annotations" in content else _of_karpathy(content, split)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{forms}: {type(error).__name__}: {error}") from error
    if not found:
        raise ValueError("it has no images")
    twice = next((name for name, count in Counter(name for name, _ in found).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice")
    none = ValueError("it has no captions")
    return [(str(root / name), captions or none) for name, captions in found]


def _of_coco(content: Any) -> list[tuple[str, list[str]]]:
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in captions:
            raise ValueError(f"a caption belongs to image_id {annotation['image_id']}, which is not among the images")
        captions[annotation["image_id"]] += _texts([annotation["caption"]])
    if len(captions) < len(content["images"]):
        raise ValueError("two of the images have the same id")
    return [(image["file_name"], captions[image["id"]]) for image in content["images"]]


def _of_karpathy(content: Any, split: str) -> list[tuple[str, list[str]]]:
    images = [image for image in content["images"] if image["split"] == split]
    if not images:
        there = Counter(image["split"] for image in content["images"])
        raise ValueError(f"no image has split {split!r}; it has {', '.join(f'{n} of {s}' for s, n in there.items())}")
    return [
        (str(Path(image.get("filepath", ""), image["filename"])), _texts(s["raw"] for s in image["sentences"]))
        for image in images
    ]


def _texts(captions: Any) -> list[str]:
    stripped = [caption.strip() for caption in captions]
    return [caption for caption in stripped if caption]
