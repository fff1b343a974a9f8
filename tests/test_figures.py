"""The figures of docs/results are those of their JSON files."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from clipq.report.figure import draw_figure, figure_page, read_figure

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
FIGURES = sorted(FOLDER.glob("*.json"))


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("L"), np.float32)


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_that_of_its_file(path: Path) -> None:
    content = read_figure(path)
    assert path.with_suffix(".md").read_text() == figure_page(content, f"{path.stem}.png"), f"clipq-report {path}"
    kept, drawn = path.with_suffix(".png").read_bytes(), draw_figure(content)
    if matplotlib.__version__ == content["environment"]["matplotlib"]:
        assert drawn == kept, f"clipq-report {path}"
    else:  # fonts and ticks move by a pixel
        assert pixels(drawn).shape == pixels(kept).shape
        assert np.abs(pixels(drawn) - pixels(kept)).mean() < 8


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_says_what_it_was_made_with(path: Path) -> None:
    environment = read_figure(path)["environment"]
    assert {"device", "torch", "commit", "matplotlib", "clipq"} <= environment.keys()
    assert not any(commit.endswith("+") for commit in environment["commit"].split(", ")), "made of uncommitted code"
    assert not re.search(r"""[\s"'=]/\w""", path.read_text()), "a path of one machine"


def test_there_are_figures() -> None:
    assert FIGURES
