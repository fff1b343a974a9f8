"""Planted spikes and rises, through a run folder, to what the page says."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipq.report.page import MOST_EVENTS, page
from clipq.report.plots import COLORS
from clipq.report.runs import Event, Run, read_runs
from clipq.report.stability import CURVES, PATCH_EMBEDDING, SPIKE, TOLD_LEADS, Stability, analyse, drawn, parts
from clipq.report.write import write_report
from clipq.watch.spikes import LossSpike, Rules
from tests.unit.report.conftest import WriteRun, train_row

IGNORE = "watch:\n  ignore: 100\n"
AT, LEAD = 300, 4


def calm(steps: int = 400, *, every: int = 1, rms: dict[str, float] | None = None) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        rows.append(train_row(step, loss=2 + max(-0.2, min(0.2, rng.gauss(0, 0.1)))))
        if step % every == 0:
            rows[-1]["rms"] = dict(rms or {PATCH_EMBEDDING: 1.0, "logit_scale": 0.9})
    return rows


def planted(at: int = AT) -> list[dict[str, Any]]:
    rows = calm()
    rows[at - 1]["loss"] = rows[at + 2]["loss"] = 5.0
    rows[at - 1 - LEAD]["rms"][PATCH_EMBEDDING] = 3.5
    return rows


def only(folder) -> Run:
    (run,) = read_runs([folder])
    return run


def where(run: Run, color: str) -> np.ndarray:
    """The places of the plot that have this colour."""
    (part,) = parts([run])
    assert part.plot is not None
    image = np.asarray(Image.open(io.BytesIO(part.plot.png)).convert("RGB")).astype(int)
    return (np.abs(image - [int(color[i : i + 2], 16) for i in (1, 3, 5)]) < 40).all(-1)


def test_a_planted_spike_is_found_with_its_lead(write_run: WriteRun) -> None:
    (run,) = read_runs([write_run(rows=planted(), config=IGNORE)])
    found = analyse(run)
    (spike,), (rise,) = found.spikes, found.rises
    assert (spike.step, spike.leads) == (AT, {PATCH_EMBEDDING: LEAD})
    assert (rise.step, rise.rms) == (AT - LEAD, 3.5)
    assert (found.steps, found.watched) == (300, 1.0)
    assert found.chance == 8 / 300
    assert found.text() == (
        "1 loss spike in 300 steps; 1 announced by a high RMS_t 1 to 8 steps before: "
        f"1 by {PATCH_EMBEDDING} (leads 4). By chance it would be 2.7 % of them. 1 rise of RMS_t to 2.3 or more."
    )


def test_quiet_runs_claim_nothing(write_run: WriteRun) -> None:
    (run,) = read_runs([write_run(rows=calm(), config=IGNORE)])
    found = analyse(run)
    assert (found.spikes, found.rises) == ((), ())
    assert found.text() == "No loss spikes in 300 steps."


def test_the_first_steps_are_left_out(write_run: WriteRun) -> None:
    (run,) = read_runs([write_run(rows=planted(), config="watch:\n  ignore: 350\n")])
    assert analyse(run).spikes == ()
    (short,) = read_runs([write_run("short", rows=planted())])  # 1,000 where the configuration says nothing
    assert analyse(short).text().startswith("No step counts yet: the first 1,000 (watch.ignore)")


def test_too_few_readings_are_said(write_run: WriteRun) -> None:
    rows = calm(every=10)
    rows[AT - 1]["loss"] = rows[AT]["loss"] = 5.0
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
        {"kind": "event", "step": 5, "event": "rewind", "to": True},
        {"kind": "event", "step": 5, "event": "rewind", "to": -1},
        {"kind": "event", "step": 5, "event": "gradient overflow", "parameters": 3},
        {"kind": "event", "step": 5},
    ]
    (run,) = read_runs([write_run(rows=rows + odd + calm(12)[10:])])
    assert len(run.train["step"]) == 12  # none of them goes back
    assert [i for i, value in enumerate(run.rms[PATCH_EMBEDDING]) if value != value] == [2, 3]
    assert (run.events, run.notes) == ((), ())


def test_the_patch_embedding_and_what_rose_highest_are_drawn(write_run: WriteRun) -> None:
    rms = {f"block.{n}": 1.0 + n for n in range(9)} | {PATCH_EMBEDDING: 0.5}
    (run,) = read_runs([write_run(rows=calm(rms=rms))])
    assert drawn(run, analyse(run)) == [PATCH_EMBEDDING, "block.8", "block.7", "block.6", "block.5"]
    assert len(drawn(run, analyse(run))) == CURVES


def test_the_first_steps_do_not_choose_what_is_drawn(write_run: WriteRun) -> None:
    rows = calm(rms={PATCH_EMBEDDING: 1.0, "late": 0.5} | {f"early.{n}": 1.0 for n in range(CURVES)})
    rows[5]["rms"] |= {f"early.{n}": 9.0 for n in range(CURVES)}
    rows[250]["rms"]["late"] = 3.0
    run = only(write_run(rows=rows, config=IGNORE))
    assert drawn(run, analyse(run))[:2] == [PATCH_EMBEDDING, "late"]


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


def test_runs_have_a_part_each_that_names_them(write_run: WriteRun) -> None:
    runs = read_runs([write_run("<a>", rows=planted(), config=IGNORE), write_run("b"), write_run("c", rows=calm())])
    found = parts(runs)
    assert [(p.run.name, p.plot.name if p.plot else None) for p in found] == [("<a>", "rms_1"), ("c", "rms_3")]
    text = page(runs, [], found[:1])
    assert "<strong>&lt;a&gt;</strong>: 1 loss spike in 300 steps" in text
    assert "<h3>Loss and RMS_t: &lt;a&gt;</h3>" in text


def test_a_bad_step_tells_only_what_was_written(write_run: WriteRun) -> None:
    bad = [{"kind": "event", "step": 3, "event": "bad step", **rest} for rest in ({"keys": None}, {"reason": "r"})]
    assert [e.text for e in only(write_run(rows=calm(5) + bad)).events] == ["no reason given", "r"]


def test_chance_is_the_share_of_steps_behind_a_high_one(write_run: WriteRun) -> None:
    rows = calm(120)
    for step in (50, 102, 105, 119):  # the first does not count; the next two cover 103 to 113, the last 120
        rows[step - 1]["rms"]["logit_scale"] = 2.3
    assert analyse(only(write_run(rows=rows, config=IGNORE))).chance == 12 / 20


def test_losses_that_are_not_finite_do_not_count_as_quiet(write_run: WriteRun) -> None:
    rows = calm()
    for row in rows[150:]:
        row["loss"] = None
    assert analyse(only(write_run(rows=rows, config=IGNORE))).text() == "No loss spikes in 50 steps."


def test_spikes_without_rms_are_told_without_a_claim(write_run: WriteRun) -> None:
    rows = planted()
    for row in rows:
        del row["rms"]
    (part,) = parts([only(write_run(rows=rows, config=IGNORE))])
    assert part.text == "1 loss spike in 300 steps."
    assert (part.plot, [line[:2] for line in part.lines]) == (None, [(AT, "loss spike")])


def test_the_sentence_stays_short() -> None:
    spikes = [LossSpike(step, 5.0, 2.0, 0.1, {f"p{n}": 3 for n in range(30)}) for step in range(TOLD_LEADS + 2)]
    text = Stability(Rules(), rises=(), spikes=tuple(spikes), steps=100, watched=1.0, chance=0.0).text()
    assert f"{len(spikes)} by p0 (leads {'3, ' * (TOLD_LEADS - 1)}3 and 2 more)" in text
    assert "p4" in text
    assert "p5" not in text
    assert " and 25 more. By chance" in text


def test_a_spike_is_marked_in_both_panels_at_its_step(write_run: WriteRun) -> None:
    for at in (200, AT):
        found = where(only(write_run(str(at), rows=planted(at), config=IGNORE)), SPIKE)
        for panel in np.array_split(found, 2, axis=0):
            column = panel.sum(axis=0)
            assert column.max() > 100
            assert column.argmax() / len(column) == pytest.approx(at / 400, abs=0.06)
    assert where(only(write_run(rows=calm(), config=IGNORE)), SPIKE).sum() == 0


@pytest.mark.parametrize("name", ["bad step", "rewind", "gradient overflow", "failed save"])
def test_events_are_marked(write_run: WriteRun, name: str) -> None:
    event = {"kind": "event", "step": 60, "event": name, "to": 60, "parameters": ["a"]}
    plain, marked = (parts([only(write_run(f"{n}", rows=calm(60) + n * [event]))])[0].plot for n in (0, 1))
    assert plain is not None
    assert marked is not None
    assert plain.png != marked.png


@pytest.mark.parametrize(
    "rms",
    [None, 0.0, -1.0, 1e30, {"$\\frac{1$": 3.0, "_hidden": 1.0, "名前": 1.0, "x" * 200: 1.0}],
    ids=["null", "zero", "negative", "huge", "names"],
)
@pytest.mark.filterwarnings("error")
def test_awkward_values_are_drawn_without_a_warning(write_run: WriteRun, rms: Any) -> None:
    rms = rms if isinstance(rms, dict) else {PATCH_EMBEDDING: rms}
    (part,) = parts([only(write_run(rows=calm(30, rms=rms)))])
    assert (part.plot is None) == (rms == {PATCH_EMBEDDING: None})


def test_one_reading_is_seen(write_run: WriteRun) -> None:
    run = only(write_run(rows=calm(15, every=10)))
    _, panels = np.array_split(where(run, COLORS[2]), 2, axis=0)  # the upper half has the legend
    assert panels.sum() > 20


def test_a_long_table_of_events_ends_with_their_number(write_run: WriteRun) -> None:
    events = [{"kind": "event", "step": n, "event": "gradient overflow", "parameters": [f"<p{n}>"]} for n in range(53)]
    run = only(write_run(rows=[train_row(step) for step in range(1, 60)] + events))
    text = page([run], [], parts([run]))
    assert text.count("<td>gradient overflow</td>") == MOST_EVENTS == 50
    assert "and 3 more" in text
    assert "&lt;p0&gt;" in text
    assert "<p0>" not in text
