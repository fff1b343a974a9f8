from __future__ import annotations

import sys

import pytest

from clipq.config.data import SourceConfig
from clipq.config.groups import OptimConfig
from clipq.config.hydra import _quote_braces, field_docs, run
from clipq.config.schema import TrainJob


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("data.shards=/d/{00000..00099}.tar", 'data.shards="/d/{00000..00099}.tar"'),
        ("data.shards=/d/{a,b}/{0..9}.tar", 'data.shards="/d/{a,b}/{0..9}.tar"'),
        ("data.shards='/d/{0..9}.tar'", "data.shards='/d/{0..9}.tar'"),
        ("data.shards=[a.tar,b.tar]", "data.shards=[a.tar,b.tar]"),
        ("data.shards=[d/{0..1}.tar,e/0.tar]", 'data.shards=["d/{0..1}.tar",e/0.tar]'),
        ("data.shards=[e/0.tar, d/{a,b}/{0..1}.tar]", 'data.shards=[e/0.tar, "d/{a,b}/{0..1}.tar"]'),
        ("data.shards=['x,{0..1}.tar',d/{0..1}.tar]", "data.shards=['x,{0..1}.tar',\"d/{0..1}.tar\"]"),
        ("data.augment.scale=[0.5, 1.0]", "data.augment.scale=[0.5, 1.0]"),
        ("+x=[{a: 1, b: 2},[1,2]]", "+x=[{a: 1, b: 2},[1,2]]"),
        ("steps=[1", "steps=[1"),
        ("+x={a: 1, b: 2}", "+x={a: 1, b: 2}"),
        ("steps=5", "steps=5"),
        ("--cfg", "--cfg"),
    ],
)
def test_shard_ranges_need_no_quotes(argument: str, expected: str) -> None:
    assert _quote_braces(argument) == expected


def test_job_as_the_program_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["data.shards=/d/{00..03}.tar", "optim.beta2=0.95", "model=vit_l_14", "schedule=constant", "steps=7"]
    monkeypatch.setattr(sys, "argv", ["clipq-train", *overrides])
    seen = []
    run(TrainJob, "train", lambda job, yaml: seen.append((job, yaml)))
    ((job, yaml),) = seen
    assert job.data.shards == "/d/{00..03}.tar"
    assert job.optim.beta2 == 0.95
    assert isinstance(job.optim, OptimConfig)
    assert job.name == "ViT-L-14-webdataset"
    assert "beta2: 0.95" in yaml


def test_entries_are_added_without_plus_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = 'data.sources={a: {shards: "d/{0..3}.tar", weight: 3}, b: {shards: [x.tar, y.tar]}}'
    tasks = "eval.tasks={c: {kind: retrieval, shards: z.tar}}"
    monkeypatch.setattr(sys, "argv", ["clipq-train", "data=mix", sources, tasks])
    seen = []
    run(TrainJob, "train", lambda job, yaml: seen.append(job))
    (job,) = seen
    assert job.data.sources == {
        "a": SourceConfig(shards="d/{0..3}.tar", weight=3.0),
        "b": SourceConfig(shards=["x.tar", "y.tar"]),
    }
    assert list(job.eval.tasks) == ["c"]


def test_field_docs_are_the_strings_beneath() -> None:
    assert field_docs(OptimConfig)["lr"] == "Peak learning rate."
