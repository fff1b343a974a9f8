"""What figures say of runs: intervals over seeds, differences of the same seeds, and runs that diverged."""

from __future__ import annotations

import math
from typing import Any

import pytest
from paper.figures import FIGURES
from paper.panels import curve, difference, final_loss, mean, shown, top1
from paper.precision import FORMATS, accuracy, formats
from paper.record import interval
from paper.spikes import leads, optimizers
from scipy import stats

from clipq.report.figure import draw_figure
from clipq.report.stability import PATCH_EMBEDDING


def record(seed: int, accuracy: float | None, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    tasks = {} if accuracy is None else {"t": [{"step": 40, "seconds": 1.0, "top1": accuracy, "chance": 0.02}]}
    plain = {"seed": seed, "evaluations": tasks, "diverged": 20 if accuracy is None else None, "loss": [loss] * 40}
    plain |= {"spikes": [], "rises": [], "rms": None, "chance": 0.0, "steps": 40, "features": {}}
    return plain | {"settings": {"watch.ignore": 0, "model.name": "X"}} | more


@pytest.mark.parametrize("n", range(2, 30))
def test_intervals_are_students(n: int) -> None:
    values = [math.sin(7.3 * k) for k in range(n)]
    low, high = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=stats.sem(values))
    m, half = interval(values)
    assert m == pytest.approx((low + high) / 2)
    assert half == pytest.approx((high - low) / 2, rel=0.01)


def test_one_seed_has_no_interval() -> None:
    assert interval([3.0]) == (3.0, None)
    assert shown((3.0, None)) == "3.00"
    assert shown((math.nan, None)) == "–"


def test_differences_are_of_the_same_seeds() -> None:
    """Seeds differ by far more than recipes do here, and by the same in both."""
    base = [record(seed, 0.1 * seed) for seed in range(3)]
    runs = [record(seed, 0.1 * seed + 0.01) for seed in (2, 0, 1)]
    delta, half = difference(runs, base, top1)
    assert delta == pytest.approx(1.0)
    assert half == pytest.approx(0, abs=1e-9)
    assert (mean(runs, top1)[1] or 0) > 10


def test_what_diverged_has_no_accuracy_and_no_final_loss() -> None:
    runs = [record(0, None, loss=9.0), record(1, 0.5, loss=2.0)]
    assert math.isnan(top1(runs[0]))
    assert math.isnan(final_loss(runs[0]))
    assert mean(runs, top1) == (50.0, None)
    assert mean(runs[:1], top1)[0] != mean(runs[:1], top1)[0]


def test_curves_are_means_over_seeds_and_steps() -> None:
    one, two = record(0, 0.5) | {"loss": [1.0] * 240}, record(1, 0.5) | {"loss": [3.0] * 239 + [None]}
    found = curve("x", [one, two])
    assert found["x"] == list(range(2, 241, 2))
    assert found["y"] == [2.0] * 119 + [pytest.approx(5 / 3, abs=1e-5)]


def test_a_recipe_beyond_the_noise_is_told_from_one_within() -> None:
    arms = {f"S, {recipe}": [record(s, 0.5 + 0.01 * s) for s in range(3)] for recipe in FORMATS}
    arms["S, llm_int8"] = [record(s, 0.4 + 0.011 * s) for s in range(3)]
    arms["S, switchback"] = [record(s, 0.5 + 0.01 * s + 0.02 * (s - 1)) for s in range(3)]
    arms["S, fp8"] = [record(0, 0.5), record(1, None), record(2, 0.5)]
    here = formats(arms)["here"]
    assert any(t.startswith("LLM.int8() is -9.90 points from bf16 (S") and "more than seeds explain" in t for t in here)
    assert any(t.startswith("SwitchBack is +0.00 points") and "within the noise of seeds" in t for t in here)
    assert "fp8, one scale a tensor, real diverged in 1 of 3 runs (S)." in here
    row = next(row for row in formats(arms)["table"]["rows"] if row[0] == "fp8, one scale a tensor, real")
    assert row[-1].endswith("1 diverged")


def test_accuracy_is_drawn_by_size_with_chance() -> None:
    recipes = ("bf16", "llm_int8", "switchback", "fp8_sim", "switchback_fp8_sim")
    arms = {
        f"{size}, {recipe}": [record(s, a) for s in range(2)]
        for size, a in (("S", 0.2), ("B", 0.4))
        for recipe in recipes
    }
    found = accuracy(arms)
    assert found["panels"][0]["x"]["ticks"] == ["S", "B"]
    assert [s["y"] for s in found["panels"][0]["series"]] == [[20.0, 40.0]] * 3
    assert found["panels"][0]["levels"] == [{"y": 2.0, "label": "chance"}]


def test_leads_are_counted_beside_chance() -> None:
    """Three spikes, two of them announced by the patch embedding, one by another tensor."""
    name = "AdamW, β2 0.999"
    announced = [{"step": 20, "loss": 2.0, "mean": 1.0, "leads": {PATCH_EMBEDDING: lead}} for lead in (1, 8)]
    other = [{"step": 30, "loss": 2.0, "mean": 1.0, "leads": {"visual.proj": 2}}]
    runs = [
        record(0, 0.5, spikes=announced, rms=[1.0] * 40, chance=0.1),
        record(1, 0.5, spikes=other, rms=[1.0] * 40, chance=0.3),
    ]
    found = leads({name: runs})
    assert found["panels"][2]["series"][0]["y"] == [1, 0, 0, 0, 0, 0, 0, 1]
    assert "3 loss spikes in 2 runs" in found["here"][0]
    assert "steps before 2 of them, of any watched tensor before 3; by chance it would be 20.0 %" in found["here"][0]
    assert [row[2] for row in found["table"]["rows"]] == ["1, 8", "not"]
    assert draw_figure({"panels": found["panels"]})[:4] == b"\x89PNG"


def test_spikes_are_counted_by_optimizer() -> None:
    spike = {"step": 20, "loss": 2.0, "mean": 1.0, "leads": {}}
    arms = {
        f"{o}, β2 {b}": [record(s, 0.3 + 0.1 * (o == "StableAdamW"), spikes=[spike] * (2 if o == "AdamW" else 0))]
        for o in ("AdamW", "AdamW, norm clipped at 1", "StableAdamW")
        for b in (0.95, 0.999)
        for s in (0,)
    }
    found = optimizers(arms)
    assert found["here"] == [
        "AdamW: 4 loss spikes in 2 runs, best top-1 30.00 %.",
        "AdamW, norm clipped at 1: 0 loss spikes in 2 runs, best top-1 30.00 %.",
        "StableAdamW: 0 loss spikes in 2 runs, best top-1 40.00 %.",
    ]
    assert found["panels"][1]["series"][0]["y"] == [2.0, 2.0]


@pytest.mark.parametrize("name", [n for n, f in FIGURES.items() if f.grid is not None])
@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_every_arm_composes(name: str, scale: str) -> None:
    from paper.grid import Options, jobs_of, settings_of

    grid = FIGURES[name].grid
    assert grid is not None
    given = {"paper": ("data.shards=x.tar", "eval.root=/data"), "small": ("data.root=/data",), "tiny": ()}[scale]
    jobs = jobs_of(grid, Options(scale=scale, seeds=1, overrides=given))
    assert len({job.name for job in jobs}) == len(jobs) == len(grid.arms[scale])
    settings = [settings_of(job) for job in jobs]
    assert len({str(sorted(s.items(), key=str)) for s in settings}) == len(jobs), "two arms are the same run"
    if scale == "paper":
        assert {s["steps"] for s in settings} == {20000}
        assert {s["schedule.warmup"] for s in settings} == {5000}
        assert {s["model.patch_dropout"] for s in settings} == {0.5}
        assert {(s["optim.weight_decay"], s["optim.eps"], s["optim.beta1"]) for s in settings} == {(0.2, 1e-6, 0.9)}
        assert name == "fig6" or {(s["batch_size"], s["optim.lr"]) for s in settings} == {(16384, 2e-3)}
