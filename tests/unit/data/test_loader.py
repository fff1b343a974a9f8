"""The training stream: its order, what a resumed loader yields, and what happens to samples that cannot be read."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipq.data.decode import Captions, TrainTransform
from clipq.data.loader import TrainStream, default_workers, make_loader, warn_of_few_shards
from clipq.data.shards import visits
from tests.helpers import colour_samples, colour_shards, encode, picture, write_shard


def tokenizer(texts: list[str]) -> Tensor:
    """ "red 17" -> [17, …]: the number of the sample, and a few bytes of its caption."""
    return torch.tensor([[int(t.split()[-1]), *t.encode()[:3]] for t in texts])


def stream(shards: list[str], **options: object) -> TrainStream:
    settings = {"batch_size": 6, "shuffle": 8, "transform": TrainTransform((8, 8), flip=0.5, scale=(0.5, 1.0))}
    return TrainStream(shards, captions=Captions("txt"), tokenizer=tokenizer, **(settings | options))  # pyright: ignore


def batches(s: TrainStream, count: int, workers: int = 0) -> list[dict[str, Tensor]]:
    return list(itertools.islice(make_loader(s, workers=workers), count))


def numbers(found: list[dict[str, Tensor]]) -> list[int]:
    return [n for batch in found for n in batch["text"][:, 0].tolist()]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in ("image", "text")
    )


def test_batch(shards: list[str]) -> None:
    (batch,) = batches(stream(shards), 1)
    assert batch["image"].shape == (6, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    assert batch["text"].shape == (6, 4)
    assert batch["text"].dtype == torch.int32
    # Each image is that of its caption: the mean colour tells.
    colours = np.array([np.asarray(picture(c, 0)).mean((0, 1)) for c in ("red", "green", "blue", "yellow")])
    for image, text in zip(batch["image"], batch["text"], strict=True):
        mean = image.float().mean((1, 2)).numpy()
        assert np.abs(colours - mean).sum(1).argmin() == int(text[0]) % 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_resumed_loader_yields_what_an_uninterrupted_one_does(shards: list[str], workers: int) -> None:
    s = stream(shards)
    whole = batches(s, 16, workers)
    for start in (1, 2, 3, 5, 10):
        assert same(batches(s.starting_at(start), 16 - start, workers), whole[start:]), start
    assert not same(whole[:4], batches(stream(shards, seed=1), 4, workers))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 12), st.integers(0, 2), st.integers(0, 99))
def test_resumed_loader_property(shards: list[str], start: int, size: int, buffer: int, rank: int, seed: int) -> None:
    s = stream(shards, batch_size=size, shuffle=buffer, rank=rank, world_size=3, seed=seed)
    assert same(batches(s.starting_at(start), 2), batches(s, start + 2)[start:])


def test_a_pass_holds_every_sample_once(tmp_path: Path) -> None:
    shards = colour_shards(tmp_path, [12, 12, 12, 12])
    for workers in (0, 2):
        found = numbers(batches(stream(shards, shuffle=1, batch_size=12), 8, workers))
        assert Counter(found[:48]) == Counter(range(48))
        assert Counter(found[48:]) == Counter(range(48))


def test_ranks_share_no_visit(shards: list[str]) -> None:
    """Put together, two ranks read the shards of a pass once."""
    sizes = dict(zip(shards, [20, 11, 17, 5, 20], strict=True))
    firsts = dict(zip(shards, np.cumsum([0, 20, 11, 17, 5]).tolist(), strict=True))
    for rank in (0, 1):
        found = numbers(batches(stream(shards, rank=rank, world_size=2, batch_size=1, shuffle=1), 60))
        order = visits(shards, seed=0, lane=rank, lanes=2)
        expected = [firsts[v] + n for v in itertools.islice(order, 20) for n in range(sizes[v])]
        assert found == expected[:60]


def test_loader_leaves_the_global_generators_alone(shards: list[str]) -> None:
    """Dropout draws from them: masks of a resumed run would differ from those of an uninterrupted one."""
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        batches(stream(shards), 2, workers)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_unreadable_samples_are_replaced_in_their_places(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = colour_samples(12)
    bad = [dict(s) for s in good]
    bad[1]["png"] = bytes(good[1]["png"])[:80]  # pyright: ignore
    bad[4]["txt"] = b"\xff"
    bad[5]["png"] = b""
    options = {"shuffle": 1, "batch_size": 6, "transform": TrainTransform((16, 16), scale=(1, 1), ratio=(1, 1))}
    expected = batches(stream([str(write_shard(tmp_path / "good.tar", good))], **options), 2)
    found = batches(stream([str(write_shard(tmp_path / "bad.tar", bad))], **options), 2)
    kept = [0, 2, 3]
    for key in ("image", "text"):
        assert torch.equal(found[0][key][kept], expected[0][key][kept])
        assert torch.equal(found[1][key], expected[1][key])
    for place in (1, 4, 5):  # another pair of the batch, both halves of it
        number = int(found[0]["text"][place, 0])
        assert number in kept
        assert torch.equal(found[0]["image"][place], expected[0]["image"][number])
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 3
    assert all(f"sample 00000{n} of {tmp_path}/bad.tar" in m for n, m in zip((1, 4, 5), messages, strict=True))
    again = batches(stream([str(tmp_path / "bad.tar")], **options), 2)
    assert same(again, found)


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_without_a_readable_sample(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    samples = [{"png": b"no image", "txt": f"red {n}"} for n in range(8)]
    shard = write_shard(tmp_path / "0.tar", samples)
    with pytest.raises(
        ValueError, match=r"none of the 6 samples of a batch could be read; the last was 00000\d of .*0.tar"
    ):
        batches(stream([str(shard)]), 1, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_ends_a_worker_is_told(shards: list[str], workers: int) -> None:
    with pytest.raises(ValueError, match="has no sample with jpg and txt; its members are: cls, json, png, txt"):
        batches(stream(shards, image="jpg"), 1, workers)


def test_one_of_several_captions(tmp_path: Path) -> None:
    samples = [
        {"png": encode(picture("red", n)), "json": json.dumps({"c": [f"{w} {n}" for w in ("aaa", "bbb")]})}
        for n in range(20)
    ]
    s = TrainStream(
        [str(write_shard(tmp_path / "0.tar", samples))], TrainTransform((8, 8)), Captions("json.c"), tokenizer, 20
    )
    drawn = [tuple(batch["text"][:, 1].tolist()) for batch in batches(s, 6)]
    assert {ord("a"), ord("b")} == set(itertools.chain(*drawn))
    assert len(set(drawn)) == 6


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [default_workers(n) for n in (1, 2, 4, 16, 32)] == [14, 7, 3, 1, 1]


def test_fewer_shards_than_lanes(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_few_shards(8, ranks=2, workers=4)
    warn_of_few_shards(1, ranks=1, workers=0)
    assert not caplog.messages
    warn_of_few_shards(7, ranks=2, workers=4)
    warn_of_few_shards(3, ranks=1, workers=4)
    warn_of_few_shards(3, ranks=4, workers=0)
    several, one, few = caplog.messages
    assert "7 shards for 8 loader processes (2 ranks with 4 each)" in several
    assert "within a batch" in several
    assert several.endswith("Pack the data into 8 shards or more, or set data.workers=3")
    assert "within a batch" not in one
    assert few.endswith("Pack the data into 4 shards or more")


def test_warnings_of_workers_reach_the_log(tmp_path: Path) -> None:
    samples = colour_samples(6)
    samples[2]["png"] = b"no image"
    shard = write_shard(tmp_path / "0.tar", samples)
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("clipq").addHandler(handler)
    try:
        batches(stream([str(shard)], shuffle=1), 1, workers=1)
    finally:
        logging.getLogger("clipq").removeHandler(handler)
        handler.close()
    assert "sample 000002" in (tmp_path / "log").read_text()
