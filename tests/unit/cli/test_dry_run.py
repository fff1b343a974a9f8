"""The plan that a dry run prints: what is counted, what is looked at, what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipq.cli import dry_run
from clipq.cli.dry_run import Gpu, Plan
from clipq.config.schema import TrainJob
from clipq.log.folder import changes
from tests.configs.test_configs import compose_job
from tests.helpers import colour_shards, tiny_arch


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    colour_shards(tmp_path / "data", [40, 31, 57])
    (tmp_path / "data" / "sizes.json").write_text('{"00000.tar": 40, "00001.tar": 31, "00002.tar": 57}')
    return [
        f"model.name={tiny_arch(tmp_path)}",
        "data.shards=data/*.tar",
        "batch_size=32",
        "steps=10",
        "schedule.warmup=2",
        "name=planned",
        "dry_run=true",
    ]


def plan(settings: list[str], *more: str, yaml: str = "") -> Plan:
    return Plan(compose_job(TrainJob, "train", *settings, *more), yaml)


def line(found: Plan, title: str) -> str:
    return next(text for name, text in found.lines if name == title)


def test_pairs_passes_and_checkpoints_are_counted(settings: list[str]) -> None:
    found = plan(settings, "checkpoint.every=4", "checkpoint.keep_every=4", "checkpoint.minutes=0", "gpus=4")
    assert found.problems == []
    assert line(found, "steps") == "10, 320 pairs"
    assert line(found, "data") == "data.shards: 3 shards, 128 pairs: 2.5 passes over them"
    assert line(found, "batch") == "32 pairs a step, 8 on each; loss softmax"
    # steps 4, 8 and 10: the two newest stay, and 4 for good
    assert line(found, "checkpoints").startswith("3 of 9.9 MB; 3 stay, 29.8 MB")
    assert "minutes old" not in line(found, "checkpoints")
    last = plan(settings, "checkpoint.every=0")
    assert line(last, "checkpoints").startswith("1 of 9.9 MB")
    assert "30 minutes old" in line(last, "checkpoints")


def test_passes_over_sources_are_by_their_weights(settings: list[str]) -> None:
    sources = "++data.sources={a: {shards: data/00000.tar, weight: 3}, b: {shards: data/00002.tar}}"
    found = plan(settings, "data=mix", "data.shards=null", sources)
    assert [text for name, text in found.lines if name == "data"] == [
        "data.sources.a: 1 shard, 40 pairs: 6 passes over them",
        "data.sources.b: 1 shard, 57 pairs: 1.4 passes over them",
    ]


def test_passes_of_sources_that_end_are_not_made_up(settings: list[str]) -> None:
    sources = "++data.sources={a: {shards: data/00000.tar, passes: 2, weight: 1e9}, b: {shards: data/00002.tar}}"
    found = plan(settings, "data=mix", "data.shards=null", sources)
    assert [text for name, text in found.lines if name == "data"] == [
        f"data.sources.{name}: 1 shard, {n} pairs; passes follow from the sources' `passes` and weights"
        for name, n in (("a", 40), ("b", 57))
    ]


def test_all_problems_are_told(settings: list[str]) -> None:
    found = plan(
        settings,
        *("gpus=3", "data.lanes=4", "backend=fp16", "parallel=fsdp", "watch.rms=[nothing]"),
        *("data.shards=[data/00000.tar,no/a.tar,no/b.tar]", "model.pretrained=no.pt"),
        *("eval=zero_shot", "eval.tasks.zero_shot.shards=no/c.tar", "eval.tasks.zero_shot.classnames=no.txt"),
    )
    begins = [
        "batch_size=32 is not divisible by the 3 processes: the nearest that is: 33",
        "backend.precision=fp16 with parallel=fsdp",
        "data.lanes=4 cannot be shared evenly by 3 processes",
        "data.shards: no shard matches 'no/a.tar'",
        "data.shards: no shard matches 'no/b.tar'",
        "eval.tasks.zero_shot.shards: no shard matches 'no/c.tar'",
        "model.pretrained=no.pt with",
        "watch.rms=['nothing']: 'nothing' matches no trained parameter",
    ]
    assert len(found.problems) == len(begins)
    assert all(problem.startswith(begin) for problem, begin in zip(found.problems, begins, strict=True))
    assert "operations" in dict(found.lines), "what is known of the model is told all the same"


def test_of_many_missing_shards_some_are_told(settings: list[str]) -> None:
    problems = plan(settings, "data.shards='no/{000..099}.tar'").problems
    assert len(problems) == 11
    assert problems[-1] == "data.shards: and 90 more"


def test_a_plan_is_for_another_machine(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine cannot do is no problem; where it has a GPU, it is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = plan(settings, "model.name=ViT-S-16", "backend=switchback_fp8", "device=cuda")
    assert here.problems == []
    assert "NVIDIA H100 80GB HBM3 (assumed)" in line(here, "time")
    monkeypatch.setattr(dry_run, "_gpu", lambda _: Gpu("NVIDIA A100-SXM4-80GB", 79.3, assumed=False))
    monkeypatch.setattr(dry_run, "cuda_capability", lambda: (8, 0))
    old = plan(settings, "model.name=ViT-S-16", "backend=switchback_fp8")
    assert old.problems == []
    assert line(old, "").startswith("not on this machine: backend.recipe=switchback_fp8 needs a GPU of compute")
    assert "NVIDIA A100-SXM4-80GB," in line(old, "time")


def test_hours_are_those_of_the_gpus(settings: list[str]) -> None:
    def minutes(*more: str) -> float:
        text = line(plan([*settings, "model.name=ViT-S-16", "steps=1000000"], *more), "time")
        assert text.startswith("about ")
        return float(text.split()[1]) * (60 if "hours on" in text else 1)

    alone = minutes("batch_size=2048")
    assert minutes("batch_size=2048", "gpus=8") == pytest.approx(alone / 8, rel=0.01)
    assert minutes("batch_size=2048", "model.grad_checkpointing=true") == pytest.approx(alone * 4 / 3, rel=0.02)


@pytest.mark.parametrize(
    ("more", "title", "expected"),
    [
        ([], "time", "not predicted: no model was measured whose blocks are narrower than 384"),
        (["backend=fp32"], "time", "not predicted: no step in fp32 was measured"),
        (["backend=llm_int8"], "time", "not predicted: no step by llm_int8 was measured"),
        (["device=cpu"], "memory, time", "are not estimated for a CPU"),
        (["gpus=3"], "memory, time", "are not estimated before the settings fit the processes, see below"),
    ],
)
def test_what_is_not_known_is_not_told(settings: list[str], more: list[str], title: str, expected: str) -> None:
    assert line(plan(settings, *more), title) == expected


def test_a_model_that_is_too_large_is_told(settings: list[str]) -> None:
    settings[0] = "model=vit_h_14"
    small = plan(settings)
    assert "more than it has" not in line(small, "memory")
    assert line(small, "checkpoints").startswith("1 of 11.8 GB"), "as docs/benchmarks/save_vit_h_h100.json has it"
    assert "more than it has" in line(plan(settings, "batch_size=4096"), "memory")
    shared = plan(settings, "batch_size=4096", "gpus=64", "parallel=hsdp")
    assert "more than it has" not in line(shared, "memory")
    assert shared.lines[0][1].endswith("; 64 GPUs on 8 nodes")


def test_a_run_that_was_begun_goes_on(settings: list[str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "runs" / "planned" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("batch_size: 16\ndry_run: false\n")
    found = plan(settings, yaml="batch_size: 32\ndry_run: true\n")
    assert "goes on from step_00000004" in line(found, "run")
    assert len(found.problems) == 1
    assert "batch_size: 16 -> 32" in found.problems[0]
    refused: Any = plan(settings, "resume=never", yaml="batch_size: 16\n").problems
    assert changes("dry_run: false\n", "dry_run: true\ngpus: 8\n") == [], "they say nothing of the training"
    assert refused == ["resume=never, but runs/planned holds step_00000004: choose another name=, or remove it"]


def test_one_rank_speaks_for_all(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = compose_job(TrainJob, "train", *settings, "data.shards=no.tar")
    with pytest.raises(SystemExit, match="2"):
        dry_run.dry_run(job, "name: planned\n")
    assert "name: planned\n" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    dry_run.dry_run(job, "name: planned\n")
    assert capsys.readouterr() == ("", "")
