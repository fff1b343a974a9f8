"""Planted spikes and rises, through a run folder, to what the page says."""

from __future__ import annotations

import random
from typing import Any

from clipq.report.runs import Event, read_runs
from clipq.report.stability import CURVES, PATCH_EMBEDDING, analyse, drawn, parts
from clipq.report.write import write_report
from tests.unit.report.conftest import WriteRun, train_row

IGNORE = "watch:\n  ignore: 100\n"
SPIKE, LEAD = 300, 4


def calm(steps: int = 400, *, every: int = 1, rms: dict[str, float] | None = None) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        rows.append(train_row(step, loss=2 + max(-0.2, min(0.2, rng.gauss(0, 0.1)))))
        if step % every == 0:
            rows[-1]["rms"] = dict(rms or {PATCH_EMBEDDING: 1.0, "logit_scale": 0.9})
    return rows


def planted() -> list[dict[str, Any]]:
    rows = calm()
    rows[SPIKE - 1]["loss"] = rows[SPIKE + 2]["loss"] = 5.0
    rows[SPIKE - 1 - LEAD]["rms"][PATCH_EMBEDDING] = 3.5
    return rows


def test_a_planted_spike_is_found_with_its_lead(write_run: WriteRun) -> None:
    (run,) = read_runs([write_run(rows=planted(), config=IGNORE)])
    found = analyse(run)
    (spike,), (rise,) = found.spikes, found.rises
    assert (spike.step, spike.leads) == (SPIKE, {PATCH_EMBEDDING: LEAD})
    assert (rise.step, rise.rms) == (SPIKE - LEAD, 3.5)
    assert (found.steps, found.watched) == (300, 1.0)
    assert found.chance == 8 / 300
    assert "1 loss spike in 300 steps; 1 announced" in found.text()
    assert f"({PATCH_EMBEDDING}: 4 steps). By chance it would be 2.7 % of them" in found.text()


def test_quiet_runs_claim_nothing(write_run: WriteRun) -> None:
    (run,) = read_runs([write_run(rows=calm(), config=IGNORE)])
    found = analyse(run)
    assert (found.spikes, found.rises) == ((), ())
    assert found.text() == "no loss spikes in 300 steps."


def test_the_first_steps_are_left_out(write_run: WriteRun) -> None:
    (run,) = read_runs([write_run(rows=planted(), config="watch:\n  ignore: 350\n")])
    assert analyse(run).spikes == ()
    (short,) = read_runs([write_run("short", rows=planted())])  # 1,000 where the configuration says nothing
    assert analyse(short).text() == "No step counts yet: the first 1,000 are left out (watch.ignore)."


def test_too_few_readings_are_said(write_run: WriteRun) -> None:
    rows = calm(every=10)
    rows[SPIKE - 1]["loss"] = rows[SPIKE]["loss"] = 5.0
    (run,) = read_runs([write_run(rows=rows, config=IGNORE)])
    text = analyse(run).text()
    assert "; 0 announced" in text
    assert "RMS_t is known at 10.0 % of the steps, too few to count lead times: watch.every=1" in text


def test_a_rewound_curve_is_dropped_its_events_are_kept(write_run: WriteRun) -> None:
    bad = {"kind": "event", "step": 205, "event": "bad step", "reason": "the loss is nan", "tensor": "x.y", "keys": "k"}
    back = {"kind": "event", "step": 210, "event": "rewind", "to": 200}
    again = [row | {"loss": 1.5, "rms": {PATCH_EMBEDDING: 1.1}} for row in calm()[200:]]
    (run,) = read_runs([write_run(rows=[*calm(210), bad, back, *again], config=IGNORE)])
    assert run.train["step"].tolist() == list(range(1, 401))
    assert set(run.train["loss"][200:]) == {1.5}
    assert set(run.rms[PATCH_EMBEDDING][:200]) == {1.0}
    assert set(run.rms[PATCH_EMBEDDING][200:]) == {1.1}
    assert run.events == (
        Event(205, "bad step", "the loss is nan, first in x.y; samples in k"),
        Event(210, "rewind", "went back to step 200"),
    )


def test_a_rewind_without_new_rows_keeps_what_came_before(write_run: WriteRun) -> None:
    back = {"kind": "event", "step": 40, "event": "rewind", "to": 30}
    (run,) = read_runs([write_run(rows=[*calm(40), back])])
    assert run.train["step"].tolist() == list(range(1, 31))
    assert len(run.rms[PATCH_EMBEDDING]) == 30


def test_malformed_values_are_no_numbers(write_run: WriteRun) -> None:
    rows = calm(10)
    rows[2]["rms"] = "none"
    rows[3]["rms"] = {PATCH_EMBEDDING: "high", "logit_scale": None}
    odd = [
        {"kind": "event", "step": 5, "event": "rewind", "to": "start"},
        {"kind": "event", "step": 5, "event": "rewind", "to": 7},
        {"kind": "event", "step": 5, "event": "gradient overflow", "parameters": 3},
        {"kind": "event", "step": 5},
    ]
    (run,) = read_runs([write_run(rows=rows + odd)])
    assert [i for i, value in enumerate(run.rms[PATCH_EMBEDDING]) if value != value] == [2, 3]
    assert (run.events, run.notes) == ((), ())


def test_the_patch_embedding_and_what_rose_highest_are_drawn(write_run: WriteRun) -> None:
    rms = {f"block.{n}": 1.0 + n for n in range(9)} | {PATCH_EMBEDDING: 0.5}
    (run,) = read_runs([write_run(rows=calm(rms=rms))])
    assert drawn(run) == [PATCH_EMBEDDING, "block.8", "block.7", "block.6", "block.5"]
    assert len(drawn(run)) == CURVES


def test_page(write_run: WriteRun, tmp_path) -> None:
    name = "<b>$weight_1$</b>"
    rows = planted()
    for row in rows:
        row["rms"][name] = 4.0
    event = {"kind": "event", "step": 7, "event": "gradient overflow", "parameters": [name]}
    text = write_report([write_run(rows=[*rows, event], config=IGNORE)], tmp_path / "out").read_text()
    assert "<h2>Stability</h2>" in text
    assert "1 loss spike in 300 steps" in text
    assert "&lt;b&gt;$weight_1$&lt;/b&gt;" in text
    assert name not in text
    assert (tmp_path / "out" / "rms.png").read_bytes()[:4] == b"\x89PNG"
    plain = write_report([write_run("plain")], tmp_path / "out2").read_text()
    assert "<h2>Stability</h2>" not in plain


def test_runs_have_a_part_each(write_run: WriteRun) -> None:
    runs = read_runs([write_run("a", rows=planted(), config=IGNORE), write_run("b"), write_run("c", rows=calm())])
    assert [(p.run.name, p.plot.name if p.plot else None) for p in parts(runs)] == [("a", "rms_1"), ("c", "rms_3")]
