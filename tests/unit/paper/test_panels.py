"""What figures say of runs: intervals over seeds, differences of the same seeds, and runs that diverged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from paper.figures import FIGURES
from paper.panels import curve, difference, final_loss, mean, seeds, shown, top1
from paper.precision import COST, FORMATS, RESCUES, accuracy, cost, formats, losses, rescue
from paper.record import chance_of_a_lead, interval
from paper.spikes import FREQUENCY, frequency, leads, optimizers
from scipy import stats

from clipq.report.figure import draw_figure
from clipq.report.stability import PATCH_EMBEDDING
from clipq.watch.spikes import Rules


def record(seed: int, accuracy: float | None, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    tasks = {} if accuracy is None else {"t": [{"step": 40, "seconds": 1.0, "top1": accuracy, "chance": 0.02}]}
    diverged = {"step": 20, "why": "nan"} if accuracy is None else None
    plain = {"seed": seed, "evaluations": tasks, "diverged": diverged, "loss": [loss] * 40}
    plain |= {"spikes": [], "rms": None, "chance": 0.0, "steps": 40, "counted": 20, "features": {}}
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


def test_what_diverged_has_no_accuracy_and_no_mean() -> None:
    """The mean of those that are left would be a choice of the good ones."""
    runs = [record(0, None, loss=9.0), record(1, 0.5, loss=2.0)]
    assert math.isnan(top1(runs[0]))
    assert math.isnan(final_loss(runs[0]))
    assert math.isnan(mean(runs, top1)[0])
    assert math.isnan(difference(runs, [record(s, 0.5) for s in range(2)], top1)[0])
    assert seeds(runs) == "2, 1 diverged"
    assert mean(runs[1:], top1) == (50.0, None)


def test_curves_are_means_over_seeds_and_steps_that_all_have() -> None:
    one, two = record(0, 0.5) | {"loss": [1.0] * 240}, record(1, 0.5) | {"loss": [3.0] * 239 + [None]}
    found = curve("x", [one, two])
    assert found["x"] == list(range(2, 241, 2))
    assert found["y"] == [2.0] * 119 + [None]
    short = curve("x", [one, two | {"loss": [3.0] * 31}])
    assert short["x"][-1] == 31
    assert short["y"] == [2.0] * 16


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
    assert row[1:] == ["3, 1 diverged", "–", "–", "–", "–"]
    arms["S, bf16"][0] = record(0, None)
    assert "bf16 diverged in 1 of 3 runs (S)." in formats(arms)["here"][0]


def features(*magnitudes: float | None) -> dict[str, Any]:
    return {"step": 1, "magnitudes": {f"visual.{n}": m for n, m in enumerate(magnitudes)}}


@pytest.mark.parametrize("last", [4.0, None, math.nan])
def test_rescue_is_drawn_where_it_diverged(last: float | None) -> None:
    """Which is what it is about: magnitudes that are not finite are null in metrics."""
    both = {"first": features(1.0, 2.0), "last": features(1.0, last)}
    arms = {arm: [record(s, 0.5, features=both) for s in range(2)] for arm in RESCUES}
    arms["fp8, one scale a tensor"][1] = record(1, None, features=both)
    found = rescue(arms)
    assert draw_figure(found)[:4] == b"\x89PNG"
    assert any("diverged in 1 of 2 runs" in sentence for sentence in found["here"])
    assert any("features grow 2.0 times" in sentence for sentence in found["here"]) == (last == 4.0)
    assert not any("nan" in sentence for sentence in found["here"])


def test_cost_and_losses_are_drawn_where_a_run_diverged() -> None:
    arms = {r: [record(s, 0.5, images_per_second=10.0, watts=500.0) for s in range(2)] for r in COST}
    arms["switchback"][0] = record(0, None, images_per_second=10.0, watts=500.0)
    found = cost(arms)
    assert draw_figure(found)[:4] == b"\x89PNG"
    assert found["table"]["rows"][0][1:4] == ["10 ± 0", "500 ± 0", "50000.0 ± 0.0"]
    assert found["table"]["rows"][1][4] == "2, 1 diverged"
    recipes = ("bf16", "llm_int8", "switchback", "fp8_sim", "switchback_fp8_sim")
    curves = {f"S, {recipe}": [record(s, 0.5) for s in range(2)] for recipe in recipes}
    curves["S, fp8_sim"][1] = record(1, None) | {"loss": [1.0] * 10 + [None]}
    found = losses(curves)
    assert "fp8, one scale a tensor has no final loss (S; seeds: 2, 1 diverged)." in found["here"]
    fp8 = next(s for s in found["panels"][1]["series"] if s["name"] == "fp8, one scale a tensor")
    assert fp8["x"][-1] == 11, "no further than all seeds"


def test_spikes_are_counted_over_the_steps_that_count() -> None:
    spike = {"step": 20, "loss": 2.0, "mean": 1.0, "leads": {}}
    arms = {arm: [record(0, 0.5, spikes=[spike])] for arm in FREQUENCY.arms["tiny"]}
    found = frequency(arms)
    assert [s["y"] for s in found["panels"][0]["series"]] == [[50.0, 50.0]], "1 in 20 steps"
    arms["reference, β2 0.999"] = [record(0, None)]
    assert frequency(arms)["panels"][0]["series"][0]["y"] == [None, 50.0]


def test_chance_is_that_of_the_patch_embedding() -> None:
    steps, rms = np.arange(1, 101), np.ones(100)
    rms[[4, 49, 52]] = 5.0  # steps 5, 50 and 53; step 5 does not count
    found = chance_of_a_lead(steps, np.ones(100), rms, Rules(ignore=20))
    assert found == 11 / 80  # 51 to 61


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
    assert (
        "steps before 2 of them, where 20.0 % would be so by chance; that of any watched tensor before 3."
        in (found["here"][0])
    )
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
        "AdamW: 4 loss spikes (runs: 2), best top-1 30.00 %.",
        "AdamW, norm clipped at 1: 0 loss spikes (runs: 2), best top-1 30.00 %.",
        "StableAdamW: 0 loss spikes (runs: 2), best top-1 40.00 %.",
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
