import json
import math

import numpy as np
import pytest

from clipq.report.runs import RunError, read_run, read_runs

from .conftest import eval_row, train_row


def test_columns_are_the_values_of_the_rows(write_run):
    rows = [train_row(step) for step in range(1, 21)]
    run = read_run(write_run(rows=rows))
    assert run.name == "run"
    assert run.train["loss"].tolist() == [row["loss"] for row in rows]
    logged = [row.get("images_per_second", math.nan) for row in rows]
    np.testing.assert_array_equal(run.train["images_per_second"], logged)
    assert np.isnan(run.train["mfu"]).all()
    assert not run.notes


@pytest.mark.parametrize(
    "tail", ['{"kind":"train","step":41,"lo', '{"kind":"train","step":41}garbage', "{", "\x00\x00"]
)
def test_a_half_written_last_line_is_left_out_without_a_word(write_run, tail):
    run = read_run(write_run(tail=tail))
    assert run.last_step == 40
    assert not run.notes


def test_a_whole_last_line_that_lacks_its_newline_counts(write_run):
    run = read_run(write_run(tail=json.dumps(train_row(41))))
    assert run.last_step == 41


def test_the_row_behind_a_half_written_one_in_the_same_line_is_kept(write_run):
    rows = [train_row(step) for step in range(1, 6)]
    more = [{"kind": "resume", "step": 5, "seconds": 2.25}, train_row(6, loss=0.5)]
    run = read_run(write_run(rows=rows, tail='{"kind":"train","st' + "\n".join(map(json.dumps, more)) + "\n"))
    assert run.resumes == ((5, 2.25),)
    assert run.train["loss"][-1] == 0.5


def test_broken_lines_inside_are_counted_and_named(write_run):
    folder = write_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[4], lines[9] = lines[4][:30], "[1, 2]"
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    assert len(run.train["step"]) == 38
    assert run.notes == ("2 lines of metrics.jsonl could not be read and were left out (line 5, 10)",)


def test_of_two_rows_of_a_step_the_later_wins(write_run):
    rows = [train_row(step, loss=1.0) for step in range(1, 11)] + [train_row(step, loss=2.0) for step in range(6, 9)]
    run = read_run(write_run(rows=rows))
    assert run.train["step"].tolist() == list(range(1, 11))
    assert run.train["loss"].tolist() == [1.0] * 5 + [2.0] * 3 + [1.0] * 2


def test_a_resume_discards_what_was_written_beyond_it(write_run):
    rows = [train_row(step, loss=1.0) for step in range(1, 11)]
    rows += [eval_row(5, "shapes", {"top1": 0.1}), eval_row(10, "shapes", {"top1": 0.9})]
    rows += [{"kind": "resume", "step": 5, "seconds": 2.25}]
    rows += [train_row(step, loss=2.0) for step in range(6, 8)]
    run = read_run(write_run(rows=rows))
    assert run.train["loss"].tolist() == [1.0] * 5 + [2.0] * 2
    assert [e.step for e in run.evaluations["shapes"]] == [5]
    assert run.resumes == ((5, 2.25),)


def test_an_earlier_resume_point_discards_a_later_one(write_run):
    rows = [train_row(step) for step in range(1, 11)]
    rows += [{"kind": "resume", "step": 8, "seconds": 3.0}, {"kind": "resume", "step": 4, "seconds": 2.0}]
    assert read_run(write_run(rows=rows)).resumes == ((4, 2.0),)


def test_evaluations_of_a_step_written_twice_count_once(write_run):
    rows = [train_row(1), eval_row(1, "a", {"top1": 0.1}), eval_row(1, "a", {"top1": 0.3})]
    (only,) = read_run(write_run(rows=rows)).evaluations["a"]
    assert only.metrics == {"top1": 0.3}


def test_losses_that_are_not_finite_are_noted(write_run):
    rows = [train_row(step) for step in range(1, 11)]
    rows[6]["loss"], rows[7]["loss"] = math.nan, None
    run = read_run(write_run(rows=rows))
    assert run.notes == ("the loss is not finite at 2 of 10 steps, first at step 7",)


def test_numbers_of_the_configuration_stay_numbers(write_run):
    run = read_run(write_run(config="optim: {lr: 1e-4, name: adamw}\nsteps: 40\n"))
    assert run.config == {"optim": {"lr": 1e-4, "name": "adamw"}, "steps": 40}


def test_optional_files_that_are_broken_are_noted_and_left_out(write_run):
    folder = write_run(config="a: [1\n")
    (folder / "environment.json").write_text("{")
    (folder / "examples").mkdir()
    (folder / "examples" / "x.json").write_text('{"examples": [{"truth": "a"}]}')
    run = read_run(folder)
    assert (run.config, run.environment, run.examples) == ({}, {}, ())
    assert [note.split(" could not be read")[0] for note in run.notes] == [
        "config.yaml",
        "environment.json",
        "examples/x.json",
    ]


def test_equal_folder_names_are_told_apart_and_a_folder_is_read_once(write_run):
    first, second = write_run("one/run"), write_run("two/run")
    assert [run.name for run in read_runs([first, second, first / ".." / "run"])] == ["one/run", "two/run"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "absent does not exist: expected a run folder"),
        (
            lambda p: p / "runs" / "a" / "metrics.jsonl",
            "metrics.jsonl is a file: expected the run folder that holds it",
        ),
        (lambda p: p / "empty", "empty is not a run folder: it has no metrics.jsonl"),
        (lambda p: p / "runs", r"runs is not a run folder.*it holds 1 of them \(a\): name those"),
    ],
)
def test_what_is_no_run_folder_is_refused(write_run, tmp_path, make, message):
    write_run("runs/a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=message):
        read_run(make(tmp_path))


@pytest.mark.parametrize("rows", [[], [eval_row(0, "shapes", {"top1": 0.1})]])
def test_a_run_without_training_rows_is_refused(write_run, rows):
    with pytest.raises(RunError, match="has no training rows yet"):
        read_run(write_run(rows=rows, tail='{"kind": "tr'))
