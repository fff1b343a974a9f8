"""Evaluation shared out over processes gives the numbers of one process, whatever each of them gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipq.data.decode import Captions
from clipq.data.evalset import EvalShards, labels_of
from clipq.dist.env import distributed
from clipq.eval.multi_label import MultiLabel
from clipq.eval.retrieval import Retrieval
from clipq.eval.zero_shot import ZeroShot, build_classifier
from tests.helpers import run_distributed, write_shard
from tests.unit.eval.fakes import ONE_PROCESS, fake_encoder, labelled, noise, npy

CLASSES = [f"thing {n}" for n in range(7)]
TEMPLATES = ["{}", "a {}"]


def tasks(folder: Path) -> dict[str, Any]:
    many = sorted(str(p) for p in (folder / "many").glob("*.tar"))  # more shards than ranks
    sources = {"many": many, "two": many[:2], "one image": [str(folder / "one.tar")], "faults": [str(folder / "x.tar")]}
    found: dict[str, Any] = {}
    for name, shards in sources.items():
        labels = EvalShards(shards)
        found[f"zero-shot {name}"] = ZeroShot(name, labels, CLASSES, TEMPLATES, {"some": [1, 2]}, examples=3)
        found[f"retrieval {name}"] = Retrieval(name, EvalShards(shards, Captions("txt", lines=True).all), examples=3)
    few = EvalShards([str(folder / "few.tar")])
    for name in ("several", "tied"):
        labels = EvalShards([str(folder / f"{name}.tar")], labels_of)
        found[name] = MultiLabel(name, labels, CLASSES[:3], TEMPLATES, examples=3)
    found["two classes"] = ZeroShot("few", few, CLASSES[:2], TEMPLATES)
    return found


def metrics_of_one_process(folder: str) -> dict[str, Any]:
    return {name: task.run(fake_encoder(ONE_PROCESS)).metrics for name, task in tasks(Path(folder)).items()}


def on_every_rank(folder: str) -> None:
    with distributed("cpu") as env:
        expected = json.loads((Path(folder) / "expected.json").read_text())
        for name, task in tasks(Path(folder)).items():
            result = task.run(fake_encoder(env))
            assert result.metrics == pytest.approx(expected[name], abs=1e-12), (env.rank, name)
            assert env.is_main or not result.examples
            assert len(result.examples) == 3 or not env.is_main or "many" not in name
            for example in result.examples:
                truth = example["truth"] if isinstance(example["truth"], list) else [example["truth"]]
                assert {*truth} <= {*CLASSES, *(f"text {n} {x}" for n in range(99) for x in "ab")}
        for count, weights in torch.load(Path(folder) / "classifiers.pt").items():  # fewer classes than ranks too
            torch.testing.assert_close(build_classifier(fake_encoder(env), CLASSES[:count], TEMPLATES), weights)

        # One rank alone meets the fault; all of them say it, and none is left waiting.
        strange = EvalShards([str(Path(folder) / "strange.tar")])
        with pytest.raises(ValueError, match="an image has class 12, but the 7 class names"):
            ZeroShot("strange", strange, CLASSES, TEMPLATES).run(fake_encoder(env))
        nothing = EvalShards([str(Path(folder) / "nothing.tar")], Captions("txt").all)
        with pytest.raises(ValueError, match="no image could be read"):
            Retrieval("nothing", nothing).run(fake_encoder(env))
        other = EvalShards([str(Path(folder) / "other.tar")], labels_of)
        with pytest.raises(ValueError, match="an image has labels of 4 classes, but there are 3 class names"):
            MultiLabel("other", other, CLASSES[:3], TEMPLATES).run(fake_encoder(env))
        env.barrier()


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_numbers_are_those_of_one_process(tmp_path: Path, world_size: int) -> None:
    labelled(tmp_path / "many", [[0, 1, 2, 3], [4, 5, 6, 0, 1, 1, 2], [3], [2, 2, 6, 1, 0], [5, 4, 3, 2, 1, 0]])
    write_shard(tmp_path / "one.tar", [{"png": noise(50), "cls": "2", "txt": "text 50 a"}])
    faulty = [{"png": noise(n) if n % 2 else b"x", "cls": str(n % 3), "txt": f"text {n} a"} for n in range(9)]
    write_shard(tmp_path / "x.tar", faulty)
    write_shard(tmp_path / "few.tar", [{"png": noise(n), "cls": str(n % 2)} for n in range(9)])
    write_shard(tmp_path / "strange.tar", [{"png": noise(n), "cls": str(12 if n == 1 else 0)} for n in range(6)])
    write_shard(tmp_path / "nothing.tar", [{"png": b"x", "txt": "text 0 a"}] * 4)
    several = [{"png": noise(n), "npy": npy([n % 2, n % 3 == 0, n > 5])} for n in range(11)]
    write_shard(tmp_path / "several.tar", several)
    write_shard(tmp_path / "tied.tar", [{**sample, "png": noise(n % 3)} for n, sample in enumerate(several)])
    write_shard(tmp_path / "other.tar", [{"png": noise(n), "npy": npy([1] * (4 if n == 1 else 3))} for n in range(6)])
    (tmp_path / "expected.json").write_text(json.dumps(metrics_of_one_process(str(tmp_path))))
    classifiers = {n: build_classifier(fake_encoder(ONE_PROCESS), CLASSES[:n], TEMPLATES) for n in (1, 2, 7)}
    torch.save(classifiers, tmp_path / "classifiers.pt")
    run_distributed(on_every_rank, world_size, str(tmp_path))
