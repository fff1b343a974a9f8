"""What pages share: one HTML document, complete in itself, without scripts; images with their captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from clipq.report.runs import Example

_IMAGE = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")
_CSS = Path(__file__).with_name("page.css")
# The browser itself then refuses whatever is not in the page, scripts included.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of parts in HTML; `title` is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_CSS.read_text(encoding='utf-8')}</style>\n"
        "</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def class_(name: str) -> str:
    """The attribute of an element; nothing for no name."""
    return f' class="{name}"' if name else ""


def example_grid(examples: Sequence[Example]) -> str:
    """Images with the captions that a model finds most probable."""
    return '<div class="examples">\n' + "\n".join(_example(example) for example in examples) + "\n</div>"


def is_right(example: Example) -> bool:
    return bool(example.best) and example.best[0][0] in example.truth


def _example(example: Example) -> str:
    if _IMAGE.fullmatch(example.image):
        image = f'<img alt="{escape(example.truth[0] if example.truth else "")}" src="{example.image}">'
    else:  # anything but image data could make the page reach out
        image = '<div class="missing">no image</div>'
    verdict = '<span class="right">✓ right</span>' if is_right(example) else '<span class="wrong">✗ wrong</span>'
    rows = []
    for caption, score in example.best:
        true = caption in example.truth
        share = 100 * score if 0 <= score <= 1 else 0.0
        rows.append(
            f'<li{class_("truth" if true else "")}><span class="bar" style="width:{share:.1f}%"></span>'
            f'<span class="caption">{"✓ " if true else ""}{escape(caption)}</span>'
            f'<span class="score">{score:.3f}</span></li>'
        )
    truth = "<br>".join(escape(t) for t in example.truth)
    return (
        f'<div class="example">{image}<div class="text">{verdict} · truth: {truth}\n<ol>'
        + "".join(rows)
        + "</ol></div></div>"
    )
