"""Class names and prompt templates, from files or from OpenCLIP's lists."""

from __future__ import annotations

from collections.abc import Sequence
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


def read_templates(where: str) -> list[str]:
    """Templates from a file, one a line, or from `TEMPLATES`; each holds one `{}` for the class name.

    `{c}`, as in the field's benchmark files, is read as `{}`.

    Raises:
        FileNotFoundError: neither a file nor a known list.
        ValueError: a template without a place for the class name.
    """
    if where in TEMPLATES:
        return [make("{}") for make in TEMPLATES[where]]
    return checked_templates(_lines(where, list(TEMPLATES)), where)


def checked_templates(lines: Sequence[str], where: str) -> list[str]:
    """Templates of a place, without blank lines; ValueError for one without a place for the class name."""
    templates = [line.replace("{c}", "{}") for line in lines if line]
    for number, template in enumerate(templates):
        if template.count("{}") < 1:
            raise ValueError(f"{where}: template {number + 1}, {template!r}, has no {{}} for the class name")
    return templates


def prompts(classname: str, templates: Sequence[str]) -> list[str]:
    """A sentence for each template."""
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
