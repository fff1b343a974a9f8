"""Figures from JSON: the same bytes every time, everything that is measured on the page, and what is no figure told."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipq.cli.report import main
from clipq.report.figure import FigureError, draw_figure, figure_page, read_figure, write_figure

CONTENT: dict[str, Any] = {
    "kind": "figure",
    "name": "fig0",
    "title": "Loss by recipe",
    "scale": "tiny",
    "command": "scripts/reproduce.py fig0 scale=tiny",
    "environment": {"device": "CPU", "torch": "2.11", "triton": None, "commit": "abc"},
    "paper": "It falls.",
    "here": ["It falls here too.", "By 3 %."],
    "differs": "",
    "panels": [
        {
            "title": "curves of $x$",
            "x": {"label": "step", "log": True},
            "y": {"label": "loss", "log": True},
            "series": [{"name": "_a", "form": "line+points", "x": [1, 2, 3], "y": [3.0, None, 1.0]}],
            "levels": [{"y": 2.0, "label": "chance"}],
            "events": [{"x": 2, "label": "spike"}],
        },
        {
            "title": "bars",
            "x": {"label": "", "ticks": ["S", "B"]},
            "y": {"label": "top-1 (%)"},
            "series": [
                {"name": "_a", "form": "bars", "x": [0, 1], "y": [1.0, 2.0], "low": [0.9, 1.9], "high": [1.1, 2.1]},
                {"name": "b", "form": "bars", "x": [0, 1], "y": [2.0, None], "low": [2.0, None], "high": [2.0, None]},
            ],
        },
        {"title": "third", "x": {"label": "x"}, "y": {"label": "y"}, "series": []},
    ],
    "table": {"columns": ["recipe", "loss"], "rows": [["a|b", "1.0 ± 0.1"]]},
}


def pixels(content: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draw_figure(content))).convert("RGB"), np.int16)


def test_the_same_file_draws_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fig0.json").write_text(json.dumps(CONTENT))
        assert main([str(tmp_path / name / "fig0.json")]) == 0
    assert (tmp_path / "a" / "fig0.png").read_bytes() == (tmp_path / "b" / "fig0.png").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda panels: panels[0]["series"][0].update(y=[3.0, 2.5, 1.0]),
        lambda panels: panels[0].update(levels=[]),
        lambda panels: panels[0].update(events=[]),
        lambda panels: panels[0].update(title="other"),
        lambda panels: panels[1]["series"][0].update(high=[1.5, 2.1]),
        lambda panels: panels[1]["x"].update(ticks=["S", "L"]),
        lambda panels: panels[0]["x"].update(log=False),
        lambda panels: panels[1]["y"].update(log=True),
        lambda panels: panels[1]["series"][1].update(name="c"),
        lambda panels: panels[0]["series"][0].update(color=3),
        lambda panels: panels[0]["series"][0].update(dash=1),
    ],
)
def test_everything_in_a_panel_is_seen(change: Any) -> None:
    changed = copy.deepcopy(CONTENT)
    change(changed["panels"])
    assert (pixels(changed) != pixels(CONTENT)).any()


def test_the_page_has_findings_table_and_command(tmp_path: Path) -> None:
    path = tmp_path / "fig0.json"
    path.write_text(json.dumps(CONTENT))
    page = write_figure(path, tmp_path / "other").read_text()
    assert page.startswith("# Loss by recipe\n")
    for part in (
        "![Loss by recipe](fig0.png)",
        "**The paper.** It falls.",
        "**Here.**\n\n- It falls here too.\n- By 3 %.\n",
        "| recipe | loss |\n| --- | --- |\n| a\\|b | 1.0 ± 0.1 |",
        "Scale `tiny`, CPU, torch 2.11, commit abc.",
        "scripts/reproduce.py fig0 scale=tiny",
    ):
        assert part in page
    assert "differ" not in page
    assert "**Where they differ.** In size." in figure_page(CONTENT | {"differs": "In size."}, "x.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no figure"),
        ('{"kind": "run"}', "is no figure"),
        ("{", "Expecting property name"),
        (json.dumps(CONTENT | {"here": "text"}), "here: expected a JSON list"),
        (json.dumps({k: v for k, v in CONTENT.items() if k != "paper"}), "paper: expected text"),
        (json.dumps(CONTENT).replace('"form": "bars"', '"form": "pie"'), "'_a' of 'bars': expected one of line, "),
        (json.dumps(CONTENT).replace('"low": [0.9, 1.9]', '"low": [0.9]'), "as many values in each list"),
    ],
)
def test_what_is_no_figure_is_told(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(FigureError, match=message):
        read_figure(path)
    assert main([str(path)]) == 2
    told = capsys.readouterr().err
    assert str(path) in told
    assert message in told
    assert not list(tmp_path.glob("*.png"))


def test_figures_and_runs_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "fig1.json"]) == 2
    assert "name the ones, or the others" in capsys.readouterr().err
