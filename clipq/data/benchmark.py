"""Evaluation sets in CLIP_benchmark's webdataset layout, as the LAION folks publish them on the Hugging Face hub.

    classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt
    test/nshards.txt  test/0.tar  test/1.tar  …

A folder, or an address of the same. `dataset_type.txt` says `retrieval` where samples have captions, a line each of
`txt`, in place of a `cls`, and `multilabel` where they have a 0 or 1 for each class in `npy`; without it they are
classified.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clipq.data.remote import is_url, open_url, require_protocol

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
CLASSIFICATION, RETRIEVAL, MULTILABEL = "classification", "retrieval", "multilabel"
_HUB = re.compile(r"(https://huggingface\.co/datasets/[^/]+/[^/]+)(?:/(?:tree|blob|resolve)/([^/]+))?/?")


@dataclass(frozen=True)
class BenchmarkSet:
    """One such data set.

    Args:
        root: folder or address; of the hub also the one of its page, `https://huggingface.co/datasets/USER/NAME`, with
            `/tree/BRANCH` or without.
        split: folder of the shards in it.
    """

    root: str
    split: str = "test"

    def kind(self) -> str:
        """`CLASSIFICATION`, `RETRIEVAL` or `MULTILABEL`.

        Raises:
            ValueError: another kind.
        """
        try:
            kind = self.read("dataset_type.txt").strip().lower()
        except FileNotFoundError:
            return CLASSIFICATION
        if kind not in (known := (CLASSIFICATION, RETRIEVAL, MULTILABEL)):
            raise ValueError(f"{self.where('dataset_type.txt')}: {kind!r}: expected {', '.join(known)}")
        return kind

    def shards(self) -> list[str]:
        """Their names, as many as `nshards.txt` says.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or no number in it.
        """
        name = f"{self.split}/nshards.txt"
        text = self.read(name).strip()
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{self.where(name)}: {text[:40]!r}: expected the number of shards")
        return [self.where(f"{self.split}/{n}.tar") for n in range(int(text))]

    def where(self, name: str) -> str:
        page = _HUB.fullmatch(self.root)
        root = self.root if page is None else f"{page[1]}/resolve/{page[2] or 'main'}"
        return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root).expanduser() / name)

    def read(self, name: str) -> str:
        """A file of the data set.

        Raises:
            FileNotFoundError: there is none.
            RemoteError: it cannot be read.
        """
        where = self.where(name)
        if not is_url(where):
            return Path(where).read_text(encoding="utf-8-sig")
        require_protocol(where)
        parts = []
        with open_url(where) as file:
            while part := file.read(1 << 20):
                parts.append(part)
        return b"".join(parts).decode("utf-8-sig")
