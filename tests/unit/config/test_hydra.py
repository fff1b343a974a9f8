from __future__ import annotations

import sys

import pytest

from clipq.config.data import FilterConfig, SourceConfig
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
    run(TrainJob, "train", lambda job, yaml: seen.append((job, yaml)), pytest.fail)
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
    run(TrainJob, "train", lambda job, yaml: seen.append(job), pytest.fail)
    (job,) = seen
    assert job.data.sources == {
        "a": SourceConfig(shards="d/{0..3}.tar", weight=3.0),
        "b": SourceConfig(shards=["x.tar", "y.tar"]),
    }
    assert list(job.eval.tasks) == ["c"]


def test_filters_and_fields_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with dots, and entries of what is empty, neither of which Hydra takes as it is."""
    own = "{min_size: 20, json: {b: [null, 1]}}"
    overrides = [
        *("data.filter.json.similarity=[0.28,null]", "data.filter.json={p.q: [0, 1]}", "data.filter.min_size=200"),
        *("data.filter={max_aspect: 3, caption_length: [5, null]}", "data.caption.field={txt: 0.25, json.syn-1: 0.75}"),
        *("data=mix", f"data.sources={{a: {{shards: x.tar, filter: {own}, caption: {{field: {{json.c: 1}}}}}}}}"),
        "data.sources.a.filter.json.c=[2,3]",
    ]
    monkeypatch.setattr(sys, "argv", ["clipq-train", *overrides])
    seen = []
    run(TrainJob, "train", lambda job, yaml: seen.append(job), pytest.fail)
    data = seen[0].data
    assert data.filter == FilterConfig(200, 3.0, [5, None], {"similarity": [0.28, None], "p.q": [0, 1]})
    assert data.caption.field == {"txt": 0.25, "json.syn-1": 0.75}
    assert data.sources["a"].filter == FilterConfig(20, json={"b": [None, 1], "c": [2, 3]})
    assert data.sources["a"].caption.field == {"json.c": 1}


def test_field_docs_are_the_strings_beneath() -> None:
    assert field_docs(OptimConfig)["lr"] == "Peak learning rate."
