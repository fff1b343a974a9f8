"""Records of evaluations: averages that say what they are of, tables, the page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clipq.eval.common import EvalResult
from clipq.eval.results import of_how_many, record_of, table
from clipq.report.evaluation import evaluation_page

PIXEL = "data:image/png;base64,iVBORw0KGgo="
FACTS: dict[str, Any] = {
    "checkpoint": "run <b>",
    "model": "ViT-B-32",
    "precision": "fp32",
    "recipe": "bf16",
    "environment": {"device": "cpu"},
}
RETRIEVAL = {"image_to_text_r1": 0.5, "text_to_image_r1": 0.25, "images": 4}


def results() -> list[EvalResult]:
    seen = [{"name": "cat", "images": 3, "top1": 1 / 3}, {"name": "dog", "images": 0, "top1": None}]
    taken = [{"truth": "cat", "taken_for": "dog & co", "images": 2}]
    pets = EvalResult("pets", "zero_shot", {"top1": 0.75, "images": 1234}, classes=seen, confusions=taken)
    pets.mistakes = [{"image": PIXEL, "truth": "cat", "best": [["dog", 0.3], ["cat", 0.2]]}]
    return [pets, EvalResult("photos", "retrieval", RETRIEVAL)]


def record(**averages: list[str]) -> dict[str, Any]:
    return record_of(FACTS, results(), averages, {"cars": "no such folder"})


def test_an_average_says_what_it_is_of() -> None:
    both, part, none = record(both=["pets", "photos"], part=["pets", "cars"], none=["cars"])["averages"]
    assert both == {
        "name": "both",
        "mean": pytest.approx((0.75 + 0.375) / 2),
        "of": {"pets": "top1", "photos": "mean_r1"},
        "missing": [],
    }
    assert of_how_many(both) == "mean of top1, mean_r1 of 2 sets"
    assert (part["mean"], part["missing"]) == (0.75, ["cars"])
    assert of_how_many(part) == "mean of top1 of 1 of 2 sets"
    assert (none["mean"], of_how_many(none)) == (None, "mean of nothing of 0 of 1 sets")


def test_tables() -> None:
    one = record(part=["pets", "cars"])
    assert table({"x": one}).splitlines()[0].split() == ["task", "metric", "value"]
    other = record_of(FACTS, results()[:1], {}, {})
    lines = {tuple(line.split("  ")[0:1]): line.split() for line in table({"a": one, "b": other}).splitlines()}
    assert lines[("task",)] == ["task", "metric", "a", "b"]
    assert "–" in lines[("photos",)], "b has no such task"
    text = table({"a": one, "b": other})
    assert "75.00%  75.00%" in text
    assert "cars    missing" in text
    assert "1,234" in text


def test_page_shows_classes_confusions_and_mistakes_and_escapes_names() -> None:
    page = evaluation_page(record(part=["pets", "cars"]), {"pets": {"Taken for something else": results()[0].mistakes}})
    assert "<h1>run &lt;b&gt;</h1>" in page
    assert '<th scope="row">cat</th><td>33.3 %</td><td>3</td>' in page
    assert "All 1 classes" in page, "a class without images has no accuracy"
    assert '<th scope="row">cat</th><td>dog &amp; co</td><td>2</td>' in page
    assert PIXEL in page
    assert "✗ wrong" in page
    assert "the mean of 1 sets; missing: cars" in page
    assert "<strong>cars</strong> is missing: no such folder" in page
    assert "<script" not in page


def test_a_record_is_json() -> None:
    assert json.loads(json.dumps(record(part=["pets"])))["results"][0]["classes"][1]["top1"] is None
