"""Class names and prompt templates, from files or from OpenCLIP's lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

CLASSNAMES = {"openclip:imagenet": IMAGENET_CLASSNAMES}
TEMPLATES = {"openclip:imagenet": OPENAI_IMAGENET_TEMPLATES, "openclip:simple": SIMPLE_IMAGENET_TEMPLATES}


def read_classnames(where: str) -> list[str]:
    """Class names from a file, a name a line (line n, from 0, names class n), or from `CLASSNAMES`.

    Two classes may have the same name, as two pairs of ImageNet's do.

    Raises:
        FileNotFoundError: neither a file nor a known list.
        ValueError: no names, a blank line between names, or no UTF-8.
    """
    return checked_classnames(CLASSNAMES[where] if where in CLASSNAMES else _lines(where, list(CLASSNAMES)), where)


def checked_classnames(names: Sequence[str], where: str) -> list[str]:
    """Class names of a place, none of which may be blank: ValueError."""
    blank = [n for n, name in enumerate(names) if not name]
    if blank:
        raise ValueError(f"{where}: line {blank[0] + 1} is blank, but line n names class n")
    return list(names)


Templates = Sequence[str] | Mapping[str, Sequence[str]]
"""Sentences with a place for the class name; or a class's own sentences by its name."""


def read_templates(where: str) -> Templates:
    """Templates from a file, one a line, or from `TEMPLATES`; each holds one `{}` for the class name.

    `{c}`, as in the field's benchmark files, is read as `{}`. A `.json` file has an object: class name -> its own
    sentences, as descriptions of classes by a language model come; `{}` in them is the name too.

    Raises:
        FileNotFoundError: neither a file nor a known list.
        ValueError: a template without a place for the class name, or JSON that is no such object.
    """
    if where in TEMPLATES:
        return [make("{}") for make in TEMPLATES[where]]
    if where.endswith(".json") and Path(where).expanduser().is_file():
        return _descriptions(where)
    return checked_templates(_lines(where, list(TEMPLATES)), where)


def _descriptions(where: str) -> dict[str, list[str]]:
    try:
        found = json.loads(Path(where).expanduser().read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where}: no JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{where}: expected an object, class name -> list of sentences")
    for name, sentences in found.items():
        if not (isinstance(sentences, list) and sentences and all(isinstance(s, str) and s.strip() for s in sentences)):
            raise ValueError(f"{where}: {name!r}: expected a list of one or more sentences")
    return {name: [s.replace("{c}", "{}") for s in sentences] for name, sentences in found.items()}


def require_all(templates: Templates, classnames: Sequence[str], where: str) -> None:
    """Raises ValueError for a class that has no sentences of its own where others have."""
    missing = [name for name in classnames if name not in templates] if isinstance(templates, Mapping) else []
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{where}: no sentences for class {missing[0]!r}{more}")


def checked_templates(lines: Sequence[str], where: str) -> list[str]:
    """Templates of a place, without blank lines; ValueError for one without a place for the class name."""
    templates = [line.replace("{c}", "{}") for line in lines if line]
    for number, template in enumerate(templates):
        if template.count("{}") < 1:
            raise ValueError(f"{where}: template {number + 1}, {template!r}, has no {{}} for the class name")
    return templates


def prompts(classname: str, templates: Templates) -> list[str]:
    """A sentence for each template; or those of the class."""
    if isinstance(templates, Mapping):
        templates = templates[classname]
    return [t.replace("{}", classname) for t in templates]


def subset_indices(where: str, classnames: Sequence[str]) -> list[int]:
    """Numbers of the classes that a file names, each once and in order; all classes of a name where several have it.

    Raises:
        ValueError: a name that is no class.
    """
    names, known = set(read_classnames(where)), set(classnames)
    if not names <= known:
        raise ValueError(f"{where}: {min(names - known)!r} is not one of the {len(classnames)} class names")
    return [number for number, name in enumerate(classnames) if name in names]


def _lines(where: str, known: list[str]) -> list[str]:
    path = Path(where).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file; expected a text file or one of {', '.join(known)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected a text file in UTF-8: {error}") from error
    return lines_of(text, where)


def lines_of(text: str, where: str) -> list[str]:
    """Lines without blanks around them, and without blank ones at the end; ValueError where none is left."""
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{where}: the file is empty")
    return lines
