"""The training stream where samples and shards cannot be read."""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipq.build_data import train_batches
from clipq.config.data import DataConfig
from clipq.data import tar
from clipq.data.decode import TrainTransform
from clipq.data.faults import Faults
from clipq.data.loader import batches
from clipq.data.shards import DataError
from clipq.data.source import Source
from clipq.dist.env import DistEnv
from tests.helpers import COLOURS, children, colour_samples, colour_shards, encode, picture, write_shard
from tests.streams import TEXT, mixed, numbers, same, stream, taken


def test_unreadable_shard_is_passed_over(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """One shard of thousands is empty, or was away for a moment: no reason to lose the run."""
    write_shard(Path(shards[3]), [])
    Path(shards[1]).write_bytes(b"")
    Path(shards[2]).unlink()
    found = numbers(taken(stream(shards, batch_size=1), 150))
    assert set(found) == {*range(20), *range(53, 73)}
    for name in shards[1:4]:
        assert name in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_the_run(shards: list[str], workers: int) -> None:
    for name in shards:
        Path(name).unlink()
    with pytest.raises(ValueError, match="no sample could be read from 10 shards in a row"):
        taken(stream(shards), 1, workers)


def test_unreadable_samples_are_replaced_in_their_places(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = colour_samples(36)
    bad = [dict(s) for s in good]
    bad[1]["png"] = bytes(good[1]["png"])[:80]  # pyright: ignore
    bad[4]["txt"] = b"\xff"
    bad[5]["png"] = b""
    options = {"shuffle": 4, "batch_size": 6, "transform": TrainTransform((16, 16), scale=(1, 1), ratio=(1, 1))}
    (expected, found) = (
        taken(stream([str(write_shard(tmp_path / name, samples))], **options), 6)
        for name, samples in (("good.tar", good), ("bad.tar", bad))
    )
    replaced = []
    for before, after in zip(expected, found, strict=True):
        for place, number in enumerate(before["text"][:, 0].tolist()):
            pair = after["image"][place], int(after["text"][place, 0])
            if number in (1, 4, 5):
                replaced.append(number)
                assert pair[1] not in (1, 4, 5)
                assert after["key"][place].endswith(f"bad.tar/{pair[1]:06d}")
                number = pair[1]  # another pair, both halves of it
                assert abs(pair[0].float().mean((1, 2)).numpy() - list(COLOURS.values())[number % 4]).max() < 12
            else:
                assert pair[1] == number
                assert torch.equal(pair[0], before["image"][place])
    assert sorted(replaced) == [1, 4, 5]
    messages = [r.getMessage() for r in caplog.records]
    assert {m.split(" left out")[0] for m in messages} == {f"sample 00000{n} of {tmp_path}/bad.tar" for n in (1, 4, 5)}
    again = taken(stream([str(tmp_path / "bad.tar")], **options), 6)
    assert same(again, found)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_readable_sample(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    samples = [{"png": b"no image", "txt": f"red {n}"} for n in range(8)]
    shard = write_shard(tmp_path / "0.tar", samples)
    with pytest.raises(ValueError, match=r"00000\d of .*0.tar cannot be read, and nor can those tried in its place"):
        taken(stream([str(shard)]), 1, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_what_is_wanted_end_the_run(
    shards: list[str], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"none of [\d,]+ samples has an image and a caption: no image .*data\.image"):
        taken(stream(shards, image="jpg", lanes=1 + (workers > 1)), 1, workers)
    assert caplog.text.count("it has no sample with jpg and txt; its members are: cls, json, png, txt") >= len(shards)


def test_one_shard_without_what_is_wanted_is_one_of_many(shards: list[str]) -> None:
    write_shard(Path(shards[1]), [{"png": encode(picture("red", 1)), "text": "red 1"}] * 11)
    found = taken(stream(shards), 40)
    assert set(numbers(found)) == {*range(20), *range(31, 73)}
    assert sum(batch["lost"] for batch in found) >= 2, "once a pass"


@pytest.mark.parametrize("shuffle", [1, 4])
@pytest.mark.parametrize("bad", [range(20), range(53, 55), range(72, 73)])
def test_a_few_bad_samples_end_no_run(bad: range, shuffle: int, tmp_path: Path) -> None:
    """Neighbours without another sample at hand, a whole shard, the last sample of a source."""
    counts, samples = [20, 11, 17, 5, 20], colour_samples(73)
    for n in bad:
        samples[n]["png"] = b"no image"
    rows = iter(samples)
    names = [str(write_shard(tmp_path / f"{n}.tar", list(itertools.islice(rows, c)))) for n, c in enumerate(counts)]
    sources = [Source(names, TEXT, "png", passes=1), Source(names[1:3], TEXT, "png", weight=0.5)]
    s = mixed(sources, lanes=4, shuffle=shuffle)
    found = taken(s, 40)
    assert not set(numbers(found)) & set(bad)
    assert sum(batch["lost"] for batch in found) == len(bad), "each once, whatever was tried in its place"
    for start in (5, 11, 14):
        assert same(taken(s.starting_at(found[start - 1]["place"]), 40 - start), found[start:])


def test_a_shard_that_is_lost_shifts_nothing_where_its_length_is_known(shards: list[str]) -> None:
    s = mixed([Source(shards, TEXT, "png", counts=[20, 11, 17, 5, 20])], lanes=2)
    whole = taken(s, 40)
    Path(shards[2]).unlink()
    found = taken(s, 40)
    lost = 0
    for before, after in zip(whole, found, strict=True):
        here = 0
        for place, number in enumerate(before["text"][:, 0].tolist()):
            if 31 <= number < 48:
                here += 1
                assert int(after["text"][place, 0]) not in range(31, 48)
            else:
                assert torch.equal(after["image"][place], before["image"][place])
        assert here <= after["lost"] <= here + 1, "and the shard itself"
        lost += here
    assert lost > 17
    for start in (3, 9, 20):
        assert same(taken(s.starting_at(found[start - 1]["place"]), 40 - start, 2), found[start:])


def test_faults_are_counted_and_bounded(shards: list[str], tmp_path: Path) -> None:
    """A tenth of the samples, and one shard of six, cannot be read."""
    samples = colour_samples(60)
    for bad in samples[::10]:
        bad["png"] = b"no image"
    names = [str(write_shard(tmp_path / "some" / f"{n}.tar", samples[n * 12 : n * 12 + 12])) for n in range(5)]
    (tmp_path / "some" / "5.tar").write_bytes(b"<html>503</html>" * 100)
    s = stream([*names, str(tmp_path / "some" / "5.tar")], lanes=1, batch_size=4)
    for workers in (0, 2):
        lost = [
            b["lost"] for b in itertools.islice(batches(stream(names, batch_size=4), workers=workers, max_lost=1), 30)
        ]
        assert 11 <= sum(lost) <= 13, "6 in a pass"
        assert min(lost) == 0
    with pytest.raises(
        ValueError, match=r"(\d+) of the last (\d+) samples could not be read, at last 0000\d+ of .*some"
    ):
        list(itertools.islice(batches(stream(names, batch_size=4), workers=0, max_lost=0.02), 200))
    found = itertools.islice(batches(s, workers=0, max_lost=0.5), 400)
    assert sum(b["lost"] for b in found) > 20
    only_shards = stream([shards[0], *([str(tmp_path / "some" / "5.tar")])], lanes=1)
    with pytest.raises(
        ValueError, match=r"of the last \d+ shards could not be read, at last .*5\.tar .*data\.max_lost"
    ):
        list(itertools.islice(batches(only_shards, workers=0, max_lost=0.3), 200))


def test_none_may_be_lost() -> None:
    Faults(samples=100).check(0.0)
    with pytest.raises(DataError, match="1 of the last 100 samples"):
        Faults(samples=100, unreadable=1).check(0.0)
    Faults(samples=100, unreadable=5).check(0.001)


def test_an_old_run_notices_faults_too() -> None:
    faults = Faults()
    for lost in (0, 1):
        for _ in range(3000):
            faults.add(Faults(samples=100, shards=1, broken=lost, last="9.tar"))
            try:
                faults.check(0.05)
            except ValueError:
                assert lost
                assert faults.broken < 70
                return
    raise AssertionError("3,000 shards were lost in a row")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_shard_is_named_once(workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twelve lanes share three shards, and come to each in every pass; it counts each time."""
    shards = colour_shards(tmp_path, [40, 40, 40])
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[:30_000])
    s = stream(shards, lanes=12, batch_size=12)
    found = taken(s, 60, workers)
    (named,) = [record.getMessage() for record in caplog.records]
    assert named.startswith(f"shard {shards[1]}: ")
    assert "samples were read before" in named
    assert sum(batch["lost"] for batch in found) > 20
    caplog.clear()
    resumed = taken(s.starting_at(found[40]["place"]), 5, workers)
    assert same(resumed, found[41:46])
    assert caplog.text.count(shards[1]) == 1, "a run that goes on has a log of its own"


def test_each_large_member_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBER", 5000)
    samples = colour_samples(20)
    samples[3]["bin"] = samples[9]["bin"] = bytes(6000)
    shard = str(write_shard(tmp_path / "0.tar", samples))
    found = taken(stream([shard]), 20)
    assert set(numbers(found)) == set(range(20))
    assert sorted(re.findall(r"(00000\d\.bin) is of 6,000 bytes: passed over", caplog.text)) == [
        "000003.bin",
        "000009.bin",
    ]
    assert len(caplog.records) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_lack_a_member_are_counted(workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In every pass, with the step whose samples come after them, also where a run goes on; they are no loss."""
    samples = colour_samples(60)
    for n in range(0, 60, 6):
        del samples[n]["txt"]
    for n in range(0, 60, 15):
        samples[n].pop("txt", None)
        del samples[n]["png"]
    shards = [str(write_shard(tmp_path / f"{n}.tar", samples[n * 20 : n * 20 + 20])) for n in range(3)]
    s = mixed([Source(shards, TEXT, "png", counts=[20] * 3)], lanes=2)
    found = taken(s, 32, workers)
    assert set(numbers(found)) == {n for n in range(60) if n % 6 and n % 15}
    counts = [sum(batch["filtered"][reason] for batch in found) for reason in ("no image", "no caption")]
    assert counts == pytest.approx([4 * 4, 8 * 4], abs=6), "four passes of 48 samples; read a little ahead"
    assert sum(batch["lost"] for batch in found) == 0
    assert caplog.messages == []
    resumed = taken(s.starting_at(found[10]["place"]), 12)
    assert [batch["filtered"] for batch in resumed] == [batch["filtered"] for batch in found[11:23]]


class KillTheLoader(TrainTransform):
    def __call__(self, data: bytes, rng: random.Random) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_loader_process_ends_the_run(shards: list[str]) -> None:
    """As the system does where memory runs out."""
    env = DistEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    config = DataConfig(name="x", shards=shards)
    with pytest.raises(DataError, match=r"a loader process ended without a word .*data\.shuffle"):
        next(train_batches(stream(shards, transform=KillTheLoader((8, 8))), 1, config, env, None))


def test_a_killed_loader_process_ends_no_step_midway(shards: list[str]) -> None:
    """Whatever the training process does meanwhile, it is told when it asks for a batch."""
    env = DistEnv(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    given = train_batches(stream(shards), 2, DataConfig(name="x", shards=shards), env, None)
    before = children(os.getpid())  # of other tests
    next(given)
    first = next(child for child in children(os.getpid()) if child not in before)
    os.kill(first, signal.SIGKILL)
    for _ in range(20):
        time.sleep(0.01)
    with pytest.raises(DataError, match=rf"a loader process ended without a word .*{first}"):
        list(itertools.islice(given, 20))


def test_warnings_of_workers_reach_the_log(tmp_path: Path) -> None:
    samples = colour_samples(6)
    samples[2]["png"] = b"no image"
    shard = write_shard(tmp_path / "0.tar", samples)
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("clipq").addHandler(handler)
    try:
        taken(stream([str(shard)], shuffle=1), 1, workers=1)
    finally:
        logging.getLogger("clipq").removeHandler(handler)
        handler.close()
    assert "sample 000002" in (tmp_path / "log").read_text()
