import csv
import io
import math
import statistics

import pytest

from clipq.report.runs import read_runs
from clipq.report.summary import chance_of, compare, duration, metric_label, primary_metrics, settings
from clipq.report.tables import console_table, csv_table, markdown_table

from .conftest import eval_row, train_row

SHAPES = {"top1": 0.7125, "top5": 0.93, "chance": 0.02, "images": 1000, "unseen_combinations_top1": 0.55}
RECALL = {
    "image_to_text_r1": 0.25,
    "image_to_text_r10": 0.75,
    "text_to_image_r1": 0.2,
    "images": 100,
    "texts": 500,
}


def parse(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_values_equal_a_recomputation_from_the_rows(write_run):
    rows = [train_row(step) for step in range(1, 241)]
    rows += [eval_row(120, "shapes", {**SHAPES, "top1": 0.1}), eval_row(240, "shapes", SHAPES)]
    environment = {"parameters": 35_400_000, "gflops_per_image": 4.71}
    (line,) = parse(csv_table(read_runs([write_run(rows=rows, environment=environment)])))
    train = [row for row in rows if row["kind"] == "train"]
    logged = [row for row in train if "data_wait" in row]
    seconds = [5 * 64 / row["images_per_second"] for row in logged]
    expected = {
        **{f"shapes/{name}": value for name, value in SHAPES.items()},
        "shapes/step": 240,
        "final_loss": statistics.fmean(row["loss"] for row in train[-12:]),
        "steps": 240,
        "samples": 240 * 64,
        "seconds": 61.0,
        "images_per_second": statistics.median(row["images_per_second"] for row in logged),
        "data_wait": sum(s * r["data_wait"] for s, r in zip(seconds, logged, strict=True)) / sum(seconds),
        "memory_gib": max(row["memory_gib"] for row in logged),
        **environment,
    }
    assert line.pop("run") == "run"
    assert set(line) == set(expected)
    for key, value in expected.items():
        assert float(line[key]) == pytest.approx(value, rel=1e-12), key


def test_resumed_rows_do_not_count_twice(write_run):
    once = [train_row(step) for step in range(1, 41)]
    twice = [train_row(step, loss=99.0) for step in range(1, 41)]
    resume = {"kind": "resume", "step": 10, "seconds": 3.5}
    runs = read_runs([write_run("once", once), write_run("twice", once[:10] + twice[10:] + [resume] + once[10:])])
    first, second = parse(csv_table(runs))
    assert (first.pop("resumes"), second.pop("resumes")) == ("", "1")
    assert first | {"run": ""} == second | {"run": ""}


def test_runs_with_different_tasks_leave_cells_empty(write_run):
    a = write_run("a", [train_row(1), eval_row(1, "shapes", SHAPES)])
    b = write_run("b", [train_row(1), eval_row(1, "flickr", RECALL)])
    first, second = parse(csv_table(read_runs([a, b])))
    assert (first["shapes/top1"], second["shapes/top1"]) == ("0.7125", "")
    assert (first["flickr/text_to_image_r1"], second["flickr/text_to_image_r1"]) == ("", "0.2")


def test_console_table_shows_shares_as_percent_and_subsets_on_their_own_line(write_run):
    run = write_run(rows=[train_row(1), eval_row(1, "shapes", SHAPES)])
    lines = [line.split("  ") for line in console_table(read_runs([run])).splitlines()]
    cells = {line[1]: line[-1].strip() for line in lines if len(line) > 2 and not line[0]}
    assert cells["top-1"] == "71.2 %"
    assert cells["unseen combinations top-1"] == "55.0 %"
    assert cells["chance"] == "2.0 %"
    assert cells["images"] == "1,000"


def test_a_linear_probe_has_its_strength_as_a_number(write_run):
    probed = {"top1": 0.5, "l2_strength": 0.0316, "images": 1_000, "train_images": 2_000}
    run = write_run(rows=[train_row(1), eval_row(1, "probe", probed)])
    lines = [line.split("  ") for line in console_table(read_runs([run])).splitlines()]
    cells = {line[1]: line[-1].strip() for line in lines if len(line) > 2 and not line[0]}
    assert (cells["top-1"], cells["l2 strength"], cells["train images"]) == ("50.0 %", "0.0316", "2,000")


def test_a_run_without_evaluation_has_a_table(write_run):
    text = console_table(read_runs([write_run()]))
    assert "final loss" in text
    assert "top-1" not in text


def test_markdown_keeps_its_columns_whatever_the_names_are(write_run):
    a = write_run("a|b", [train_row(1), eval_row(1, "x|y<b>", SHAPES)], config="lr: 1\n")
    b = write_run("c", [train_row(1)], config="lr: '2|3'\n")
    text = markdown_table(read_runs([a, b]))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {4}
    assert "<b>" not in text
    assert "| lr | 1 | 2\\|3 |" in text


def test_best_is_marked_only_between_runs_that_differ_as_shown(write_run):
    scores = {"a": 0.5, "b": 0.50001, "c": 0.4}
    runs = read_runs(
        [write_run(n, [train_row(1), eval_row(1, "t", {"top1": s, "chance": 0.1})]) for n, s in scores.items()]
    )
    lines = {line.key: line for line in compare(runs)}
    assert lines["t/top1"].best() == {0, 1}
    assert lines["t/chance"].best() == set()


def test_losses_of_different_batches_are_not_compared(write_run):
    same = [write_run("a", [train_row(1, loss=1.0)]), write_run("b", [train_row(1, loss=2.0)])]
    other = write_run("c", [train_row(1, loss=0.5, batch=32)])
    assert next(q for q in compare(read_runs(same)) if q.key == "final_loss").best() == {0}
    assert next(q for q in compare(read_runs([*same, other])) if q.key == "final_loss").best() == set()


def test_a_diverged_run_is_not_the_best(write_run):
    runs = read_runs([write_run("a", [train_row(1, loss=math.nan)]), write_run("b", [train_row(1, loss=3.0)])])
    line = next(q for q in compare(runs) if q.key == "final_loss")
    assert [line.text(0), line.text(1)] == ["not finite", "3.0000"]
    assert csv_table(runs).count("nan") == 1


def test_settings_differ_where_values_do_and_not_for_the_name(write_run):
    a = write_run("a", config="name: a\noptim: {lr: 0.001, eps: 1.0e-06}\n")
    b = write_run("b", config="name: b\noptim: {lr: 0.002, eps: 1.0e-06, clip_norm: null}\n")
    found = {name: (values, differs) for name, values, differs in settings(read_runs([a, b]))}
    assert found["name"] == (("a", "b"), False)
    assert found["optim.lr"] == (("0.001", "0.002"), True)
    assert found["optim.eps"] == (("1e-06", "1e-06"), False)
    assert found["optim.clip_norm"] == ((None, "null"), True)


def test_a_run_without_configuration_differs_in_nothing(write_run):
    runs = read_runs([write_run("a", config="lr: 1\n"), write_run("b")])
    assert settings(runs) == [("lr", ("1", None), False)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7530, "2 h 06 min"),
        (273600, "3 d 04 h"),
        (math.nan, "not finite"),
    ],
)
def test_durations_round_to_what_is_shown(seconds, text):
    assert duration(seconds) == text


def test_metric_labels():
    assert metric_label("image_to_text_r10") == "image → text R@10"
    assert metric_label("unseen_combinations_top1") == "unseen combinations top-1"


def test_average_precision_is_a_share_with_a_chance(write_run):
    metrics = {"mean_average_precision": 0.4, "chance": 0.1, "images": 7, "failed": 0}
    assert primary_metrics(list(metrics)) == ["mean_average_precision"]
    assert chance_of("mean_average_precision", metrics) == 0.1
    shown = console_table(read_runs([write_run("a", rows=[train_row(1), eval_row(1, "voc", metrics)])]))
    assert "40.0 %" in shown
