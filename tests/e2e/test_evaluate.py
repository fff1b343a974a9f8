"""clipq-eval on many checkpoints and data sets, on a run that is followed, and by two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipq.report.runs import read_run
from tests.helpers import colour_shards, command, command_on_two_ranks, encode, picture, write_shard

STEPS = ["step_00000004", "step_00000008", "step_00000012"]
TASK = ["eval=zero_shot", "backend=fp32", "device=cpu", "eval.workers=1"]


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """A run with three checkpoints, and 45 images of four classes: an odd number for two processes."""
    colour_shards(world / "test", [28, 17])
    settings = [
        "model.name=tiny.json",
        "data.shards=data/*.tar",
        "backend=fp32",
        "device=cpu",
        "batch_size=16",
        "steps=12",
    ]
    rates = ["optim.lr=1e-3", "schedule.warmup=2", "data.workers=0", "name=r"]
    command("train", *settings, *rates, "checkpoint.every=4", "checkpoint.keep_last=3", cwd=world)
    return world


def task(world: Path, *more: str) -> list[str]:
    of = "eval.tasks.zero_shot"
    names = [f"{of}.classnames={world}/test/classnames.txt", f"{of}.templates={world}/test/templates.txt"]
    return [*TASK, f"{of}.shards={world}/test/*.tar", *names, *more]


def test_a_run_is_followed(trained: Path) -> None:
    done = command("eval", "checkpoint=runs/r", "follow=true", *task(trained), cwd=trained)
    folder = trained / "runs" / "r" / "eval"
    assert sorted(p.name for p in folder.iterdir()) == [
        "metrics.jsonl",
        *(f"{s}{e}" for s in STEPS for e in (".html", ".json")),
    ]
    found = read_run(trained / "runs" / "r").evaluations["zero_shot"]
    assert [e.step for e in found] == [4, 8, 12]
    assert [e.metrics["images"] for e in found] == [45, 45, 45]
    assert all(e.seconds > 0 for e in found), "the time is that of the step"
    assert done.stdout.count("evaluating") == 3
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([rows[0], rows[2][:20], rows[2]]) + "\n")
    again = command("eval", "checkpoint=runs/r", "follow=true", *task(trained), cwd=trained)
    assert again.stdout.count("evaluating") == 1, "the others are noted"
    other = ["eval=retrieval", "device=cpu", "eval.workers=1", "output=followed"]
    shards = ["eval.tasks.retrieval.shards=test/*.tar", "eval.tasks.retrieval.caption.field=txt"]
    done = command("eval", "checkpoint=runs/r", "follow=true", *other, *shards, cwd=trained)
    assert done.stdout.count("evaluating") == 3, "for another task they are not done"
    assert sorted(p.name for p in (trained / "followed").glob("*.json")) == [f"{step}.json" for step in STEPS]
    os.utime(trained / "runs" / "r" / "checkpoints" / STEPS[2])
    again = command("eval", "checkpoint=runs/r", "follow=true", *task(trained), cwd=trained)
    assert again.stdout.count("evaluating") == 1, "written anew"


def test_a_run_brings_its_own_tasks(trained: Path) -> None:
    """Without eval= it is evaluated on what it was trained to be evaluated on."""
    own, settings = trained / "runs" / "own", ["checkpoint=runs/own", "backend=fp32", "device=cpu"]
    shutil.copytree(trained / "runs" / "r", own)
    content = yaml.safe_load((own / "config.yaml").read_text())
    names = {"classnames": "test/classnames.txt", "templates": "test/templates.txt"}
    content["eval"] |= {"root": "test", "tasks": {"mine": {"shards": "test/*.tar", **names}}}
    (own / "config.yaml").write_text(yaml.safe_dump(content))
    command("eval", *settings, "output=own.json", cwd=trained)
    command("eval", *settings, *task(trained), "output=named.json", cwd=trained)
    found, named = (json.loads((trained / f"{n}.json").read_text())["results"][0] for n in ("own", "named"))
    assert found["task"] == "mine"
    assert found["metrics"] == named["metrics"]


def test_many_checkpoints_and_a_set_that_is_not_there(trained: Path) -> None:
    missing = ["eval.tasks={gone: {folder: nowhere, classnames: 'openclip:imagenet', templates: 'openclip:simple'}}"]
    suite = [*missing, "eval.missing=report", "+eval.averages.all=[zero_shot,gone]"]
    done = command("eval", "checkpoint=runs/r/checkpoints/step_*", "output=out", *task(trained, *suite), cwd=trained)
    last = done.stdout[done.stdout.rindex("task ") :]
    assert last.splitlines()[0].split() == ["task", "metric", *STEPS]
    records = [json.loads((trained / "out" / f"{step}.json").read_text()) for step in STEPS]
    tops = [r["results"][0]["metrics"]["top1"] for r in records]
    assert len(set(tops)) > 1, "each has weights of its own"
    assert f"{100 * tops[0]:.2f}%" in last
    assert [r["averages"][0]["missing"] for r in records] == [["gone"]] * 3
    assert "mean of top1 of 1 of 2 sets" in last
    assert "nowhere" in records[0]["missing"]["gone"]
    failed = command("eval", "checkpoint=runs/r", *task(trained, *missing), cwd=trained, check=False)
    assert failed.returncode == 2
    assert "nowhere" in failed.stderr, "without a suite's word it is an error"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["checkpoint=runs/r/checkpoints/none_*"], "nothing with weights matches this pattern"),
        (["checkpoint=[runs/r,runs/gone]"], "runs/gone"),
        (["checkpoint=runs", "follow=true"], "expected the folder of a run"),
        (["checkpoint=runs/r", "output=results"], "expected a file that ends in .json, or a folder, which ends in /"),
        (["checkpoint=runs/r", "output=tiny.json/x.json"], "tiny.json cannot be made"),
        (["checkpoint=[runs/r,a]", "output=out2/"], "checkpoint=a: no such file or folder"),
        (["checkpoint=[runs/r]", "follow=true"], "expected one run folder"),
        (["checkpoint=runs/r", "+eval.averages.x=[y]"], "expected names of eval.tasks"),
    ],
)
def test_mistakes(settings: list[str], says: str, trained: Path) -> None:
    done = command("eval", *settings, *task(trained), cwd=trained, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_fails_does_not_take_the_others_along(trained: Path) -> None:
    """A damaged checkpoint among good ones; a set of a suite whose labels are not its classes."""
    shutil.copytree(trained / "runs" / "r" / "checkpoints", trained / "some")
    weights = trained / "some" / STEPS[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (trained / "some" / "no_checkpoint").mkdir()
    labelled = [{"png": encode(picture("red", n)), "cls": "0"} for n in range(102)]
    write_shard(trained / "late.tar", [*labelled, {"png": encode(picture("red", 1)), "cls": "7"}])
    late = "{shards: late.tar, classnames: test/classnames.txt, templates: 'openclip:simple'}"
    suite = [f"eval.tasks={{late: {late}}}", "eval.missing=report", "+eval.averages.all=[zero_shot,late]"]
    done = command("eval", "checkpoint=some/*", "output=kept", *task(trained), cwd=trained, check=False)
    assert done.returncode == 2
    assert f"1 of 3 checkpoints could not be evaluated: {STEPS[0]}" in done.stderr
    assert [p.name for p in sorted((trained / "kept").glob("*.json"))] == [f"{step}.json" for step in STEPS[1:]]
    assert "no_checkpoint has no weights, and is passed over" in done.stdout + done.stderr
    record = json.loads((trained / "kept" / f"{STEPS[1]}.json").read_text())
    assert record["weights"].endswith(f"{STEPS[1]}/model.safetensors")
    assert record["tasks"]["zero_shot"]["shards"] == f"{trained}/test/*.tar"
    done = command("eval", "checkpoint=runs/r", "output=late.json", *task(trained, *suite), cwd=trained)
    assert "an image has class 7" in done.stdout + done.stderr
    record = json.loads((trained / "late.json").read_text())
    assert [r["task"] for r in record["results"]] == ["zero_shot"]
    assert "an image has class 7" in record["missing"]["late"]
    assert record["averages"][0]["missing"] == ["late"]


@pytest.mark.slow
def test_compiled_blocks_find_the_same(trained: Path) -> None:
    found = {}
    for compiled in ("on", "auto"):
        settings = [f"backend.compile={compiled}", f"output={compiled}.json", *task(trained)]
        cache = trained / f"compiled_{compiled}"
        command("eval", "checkpoint=runs/r", *settings, cwd=trained, TORCHINDUCTOR_CACHE_DIR=str(cache))
        found[compiled] = json.loads((trained / f"{compiled}.json").read_text())["results"]
        assert any(cache.rglob("*.py")) == (compiled == "on"), "inductor writes a module for each graph"
    assert found["on"] == found["auto"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(trained: Path) -> None:
    command("eval", "checkpoint=runs/r", "output=one.json", *task(trained), cwd=trained)
    done = command_on_two_ranks("eval", "checkpoint=runs/r", "output=two.json", *task(trained), cwd=trained)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((trained / name).read_text()) for name in ("one.json", "two.json"))
    assert one["results"] == two["results"], "classes and confusions among them"
    assert sum(c["images"] for c in one["results"][0]["classes"]) == 45


def test_waiting_is_ended_by_ctrl_c(trained: Path) -> None:
    run = trained / "runs" / "longer"
    shutil.copytree(trained / "runs" / "r" / "checkpoints" / STEPS[0], run / "checkpoints" / STEPS[0])
    config = (trained / "runs" / "r" / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 12", "steps: 99"))
    settings = [sys.executable, "-m", "clipq.cli.eval", "checkpoint=runs/longer", "follow=true", *task(trained)]
    process = subprocess.Popen(
        settings,
        cwd=trained,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # who runs the tests in the background of a shell has the signal ignored, and so would have the process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "waiting for a checkpoint of runs/longer after step 4 of 99" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert (run / "eval" / "metrics.jsonl").read_text().count("zero_shot") == 1
