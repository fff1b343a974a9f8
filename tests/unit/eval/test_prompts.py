"""Class names and templates from files as people and benchmarks write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

from clipq.eval.prompts import prompts, read_classnames, read_templates, require_all, subset_indices


@pytest.fixture
def file(tmp_path: Path):
    def write(content: str | bytes) -> str:
        path = tmp_path / "file.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("cat\ndog\n", ["cat", "dog"]),
        (" cat \r\ndog", ["cat", "dog"]),
        ("cat\ndog\n\n \n", ["cat", "dog"]),
        ("\ufeffcat\ncafé {x}\n", ["cat", "café {x}"]),
        ("crane\ndog\ncrane\n", ["crane", "dog", "crane"]),
    ],
)
def test_classnames(file, content: str, expected: list[str]) -> None:
    assert read_classnames(file(content)) == expected


def test_lists_of_openclip() -> None:
    assert read_classnames("openclip:imagenet") == list(IMAGENET_CLASSNAMES)
    templates = read_templates("openclip:imagenet")
    assert len(templates) == 80
    assert prompts("tench", templates) == [make("tench") for make in OPENAI_IMAGENET_TEMPLATES]
    assert len(read_templates("openclip:simple")) == 7


def test_templates(file) -> None:
    templates = read_templates(file("{}\n\na photo of a {c}, {} or {c}.\n\n"))
    assert prompts("red {c} {}", templates) == ["red {c} {}", "a photo of a red {c} {}, red {c} {} or red {c} {}."]


@pytest.mark.parametrize(
    ("read", "content", "says"),
    [
        (read_classnames, "cat\n\ndog\n", "line 2 is blank, but line n names class n"),
        (read_classnames, "\ncat\n", "line 1 is blank"),
        (read_classnames, "", "is empty"),
        (read_classnames, " \n\n", "is empty"),
        (read_classnames, b"caf\xe9\n", "file.txt: expected a text file in UTF-8"),
        (read_templates, "\n\n", "is empty"),
        (read_templates, "a photo of a {}.\na photo\n", "template 2, 'a photo', has no {} for the class name"),
    ],
)
def test_faults(file, read, content: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("{}", r"\{\}")):
        read(file(content))


@pytest.mark.parametrize("read", [read_classnames, read_templates])
@pytest.mark.parametrize("where", ["no.txt", "openclip:imagnet"])
def test_unknown_lists_name_the_known(read, where: str) -> None:
    says = f"{where}: no such file; expected a text file or one of openclip:imagenet"
    with pytest.raises(FileNotFoundError, match=says):
        read(where)


def test_subsets(file) -> None:
    classnames = ["crane", "dog", "crane", "cat"]
    assert subset_indices(file("cat\ndog\n"), classnames) == [1, 3]
    assert subset_indices(file("cat\ncat\n"), classnames) == [3]  # counted once
    assert subset_indices(file("crane\n"), classnames) == [0, 2]  # both classes of the name
    with pytest.raises(ValueError, match=r"file.txt: 'cow' is not one of the 4 class names"):
        subset_indices(file("dog\ncow\n"), classnames)


def test_sentences_of_each_class(tmp_path: Path) -> None:
    path = tmp_path / "described.json"
    path.write_text(json.dumps({"tench": ["a fish {}", "it swims"], "crane": ["a bird"]}))
    found = read_templates(str(path))
    assert prompts("tench", found) == ["a fish tench", "it swims"]
    require_all(found, ["crane", "tench"], str(path))
    with pytest.raises(ValueError, match=r"described.json: no sentences for class 'dog' \(and 1 more\)"):
        require_all(found, ["tench", "dog", "cat"], str(path))
    require_all(["a {}"], ["dog"], "x")


@pytest.mark.parametrize("content", ["[1]", "{", "{}", '{"tench": []}', '{"tench": "a fish"}', '{"tench": [" "]}'])
def test_sentences_that_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "described.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"described.json: "):
        read_templates(str(path))
