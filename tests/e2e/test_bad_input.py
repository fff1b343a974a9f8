"""Mistakes that people make, and what they are told: one message, exit code 2, before any model is built."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import clipq.build
from clipq.cli import eval as eval_command
from clipq.cli import train as train_command
from clipq.model.clip import create_model
from clipq.model.weights import save_weights
from tests.helpers import colour_samples, colour_shards, command, command_on_two_ranks, tiny_arch, write_shard


def zero_shot(shards: str, classnames: str) -> list[str]:
    task = "eval.tasks.zero_shot"
    return ["eval=zero_shot", f"{task}.shards={shards}", f"{task}.classnames={classnames}"]


MISTAKES = {
    "unknown setting": (["optim.lrr=1"], ["optim.lrr: no such setting", "Did you mean optim.lr?", "weight_decay"]),
    "added setting": (["+optim.foo=1"], ["optim.foo: no such setting", "optim has: name, lr"]),
    "added at the top": (["+new=1"], ["new: no such setting", "steps"]),
    "added below a value": (["++optim.x.y=1"], ["optim.x: no such setting"]),
    "wrong type": (["steps=many"], ["steps: Value 'many'", "Integer", "Optimizer steps of the whole run"]),
    "wrong choice": (["backend.precision=bf15"], ["backend.precision", "bf16, fp16, fp32"]),
    "unknown option": (
        ["model=vit_b_33"],
        ["model=vit_b_33: no such option", "Did you mean model=vit_b_32?", "vit_h_14"],
    ),
    "unknown group": (["modle=vit_b_32"], ["modle: no such setting", "Did you mean model?"]),
    "unreadable override": (["steps=[1"], ["cannot read the override 'steps=[1'", "key=value"]),
    "no data": (["data=webdataset"], ["data.shards is not set", "Training shards"]),
    "no root": (["data=tiny_imagenet"], ["data.root is not set"]),
    "missing shard": (["data.shards=no/{00..03}.tar"], ["no shard matches 'no/00.tar'", "no/{00..03}.tar"]),
    "empty glob": (["data.shards=no/*.tar"], ["no shard matches 'no/*.tar'"]),
    "folder for shards": (["data.shards=data"], ["data is a folder", "data/*.tar"]),
    "shards and sources": (
        ["data.sources={a: {shards: data/00000.tar}}", "data.shards=data/*.tar"],
        ["data.shards and data.sources", "exactly one"],
    ),
    "a source without weight": (
        ["data=mix", "data.sources={a: {shards: data/00000.tar, weight: 0}}"],
        ["data.sources.a.weight=0", "positive"],
    ),
    "all sources end": (
        ["data=mix", "data.sources={a: {shards: data/00000.tar, passes: 3}}"],
        ["data.sources", "leave one source without"],
    ),
    "a source that is not there": (["data=mix", "data.sources={a: {shards: no.tar}}"], ["no shard matches 'no.tar'"]),
    "no lanes": (["data.lanes=0"], ["data.lanes=0", "1 or more"]),
    "shard twice": (["data.shards=[data/00000.tar,data/00000.tar]"], ["data/00000.tar is named twice"]),
    "shard that is none": (["data.shards=tiny.json"], ["data.shards: no sample could be read from tiny.json"]),
    "missing caption field": (["data.caption.field=json.nothing"], ["json field 'nothing'", "has: captions, n"]),
    "negative steps": (["steps=0"], ["steps=0: expected 1 or more"]),
    "warm-up too long": (["steps=10", "schedule.warmup=20"], ["schedule.warmup=20", "steps=10", "lower it"]),
    "cooldown without its schedule": (["schedule.cooldown=5"], ["constant_cooldown"]),
    "crop larger than the image": (["data.augment.scale=[0.5,1.5]"], ["data.augment.scale", "1.0"]),
    "negative learning rate": (["optim.lr=-1"], ["optim.lr=-1", "positive"]),
    "unknown recipe": (["backend.recipe=int4"], ["backend.recipe", "switchback", "llm_int8"]),
    "fp8 types for int8": (
        ["backend=switchback", "backend.fp8_grad=e4m3"],
        ["backend.fp8_grad", "backend.recipe=switchback", "switchback_fp8"],
    ),
    "table of speeds that is not there": (
        ["backend=switchback", "backend.skip=gpu.json"],
        ["backend.skip=gpu.json", "off, auto", "python -m clipq.lowp.measure"],
    ),
    "loss scale without fp16": (["backend.loss_scale=65536"], ["backend.loss_scale=65536", "backend.precision=fp16"]),
    "a policy that the guard does not have": (["guard.policy=ignore"], ["guard.policy", "stop, skip, rewind"]),
    "a bound below the mean": (["guard.rise=-1"], ["guard.rise=-1", "a positive number"]),
    "a bound where a scaler decides": (["guard.rise=2", "backend=fp16"], ["guard.rise=2", "backend.precision=fp16"]),
    "watching never": (["watch.every=0"], ["watch.every=0", "1 or more steps"]),
    "nothing to skip": (["backend.skip=auto"], ["backend.skip=auto", "nothing to skip"]),
    "GPUs of no plan": (["gpus=8"], ["gpus=8 without dry_run=true", "torchrun or SLURM"]),
    "a plan for no GPUs": (["dry_run=true", "gpus=0"], ["gpus=0: expected 1 or more, or null"]),
    "no parts of a batch": (["accumulation=0"], ["accumulation=0: expected 1 or more"]),
    "CUDA graph on a CPU": (["backend.cuda_graph=on", "device=cpu"], ["backend.cuda_graph=on needs a CUDA GPU"]),
    "buckets without DDP": (
        ["parallel=fsdp", "parallel.bucket_mb=50"],
        ["parallel.bucket_mb=50 with parallel=fsdp: only parallel=ddp has it"],
    ),
    "resharding without shards": (
        ["parallel.reshard_after_forward=false"],
        ["parallel.reshard_after_forward=false with parallel=ddp: only parallel=fsdp and parallel=hsdp have it"],
    ),
    "copies without HSDP": (["parallel=fsdp", "parallel.replicas=2"], ["parallel.replicas=2", "only parallel=hsdp"]),
    "one copy": (["parallel=hsdp", "parallel.replicas=1"], ["parallel.replicas=1: expected 2", "parallel=fsdp"]),
    "a dynamic loss scale in shards": (
        ["parallel=fsdp", "backend=fp16"],
        ["backend.precision=fp16 with parallel=fsdp", "backend.loss_scale=65536"],
    ),
    "setting of another optimizer": (
        ["optim.clip_threshold=2"],
        ["optim.clip_threshold=2", "optim.name=adamw", "only optim=stable_adamw"],
    ),
    "a bound that never holds": (["guard.rise=2", "steps=6"], ["guard.rise=2", "watch.ignore=1000"]),
    "no threshold": (["optim=stable_adamw", "optim.clip_threshold=0"], ["optim.clip_threshold=0", "inf"]),
    "unknown optimizer": (["optim=lion"], ["optim", "lion", "stable_adamw"]),
    "infinite learning rate": (["optim.lr=inf"], ["optim.lr=inf", "finite"]),
    "no number": (["optim.weight_decay=nan"], ["optim.weight_decay=nan", "finite"]),
    "infinite logit scale": (["max_logit_scale=inf"], ["max_logit_scale=inf"]),
    "profile after the end": (["steps=10", "log.profile=[8,11]"], ["log.profile=[8, 11]", "steps=10"]),
    "fp16 on a CPU": (["backend=fp16", "device=cpu"], ["backend.precision=fp16", "needs a CUDA GPU", "bf16 or fp32"]),
    "name with a slash": (["name=a/b"], ["name='a/b'", "runs="]),
    "unknown model": (["model.name=ViT-B-23"], ["ViT-B-23", "ViT-B-32"]),
    "layer scale on a ResNet": (["model.name=RN50", "model.layer_scale_init=0.0"], ["layer_scale_init", "RN50"]),
    "missing weights": (["model.pretrained=no.pt"], ["no.pt"]),
    "caption field": (["data.caption.field=text"], ["data.caption.field='text'", "json.NAME"]),
    "fields that do not add up": (
        ["data.caption.field={txt: 0.5, json.captions: 0.4}"],
        ["data.caption.field={'txt': 0.5, 'json.captions': 0.4}", "1 as their sum"],
    ),
    "fields without a probability": (["data.caption.field=[txt]"], ["data.caption.field=['txt']", "{txt: 0.5, "]),
    "a field of a wrong name": (["data.caption.field={txt: 0.5, syn: 0.5}"], ["'syn': 0.5", "json.NAME"]),
    "a field with no chance": (["data.caption.field={txt: 1, json.captions: 0}"], ["a positive probability"]),
    "evaluation by chance": (
        [
            "eval=retrieval",
            "eval.tasks.retrieval.shards=data/*.tar",
            "eval.tasks.retrieval.caption.field={txt: 0.5, json.captions: 0.5}",
        ],
        ["eval.tasks.retrieval.caption.field=", "expected one field"],
    ),
    "one bound": (["data.filter.json.n=0.3"], ["data.filter.json.n=0.3: expected [lowest, highest]", "[0.28,null]"]),
    "bounds that are no numbers": (["data.filter.json.n=[a,true]"], ["data.filter.json.n=['a', True]", "expected"]),
    "bounds the wrong way": (["data.filter.json.n=[3,1]"], ["data.filter.json.n=[3, 1]: nothing is in it"]),
    "less than no characters": (["data.filter.caption_length=[-1,9]"], ["data.filter.caption_length=[-1, 9]"]),
    "no size": (["data.filter.min_size=0"], ["data.filter.min_size=0: expected 1 or more"]),
    "no such aspect": (["data.filter.max_aspect=0.5"], ["data.filter.max_aspect=0.5: expected a finite number from 1"]),
    "unknown filter": (["data.filter={minsize: 3}"], ["data.filter.minsize", "Did you mean data.filter.min_size?"]),
    "the filter of a source, beside it": (
        ["data=mix", "data.sources={a: {shards: data/*.tar}}", "data.sources.a.filter.min_size=3"],
        ["a part of what is not set", "data.sources={a: {shards: a.tar, filter: {min_size: 200}}}"],
    ),
    "a filter that leaves out all": (
        ["data.filter={min_size: 17, json: {n: [20, null]}}"],
        ["data.shards: the filter leaves out all of 24 samples: json.n 20, min_size 4. Loosen data.filter"],
    ),
    "a filter by what is not there": (["data.filter.json.similarity=[0.3,null]"], ["json.similarity.missing 24"]),
    "task without class names": (
        ["eval=zero_shot", "eval.tasks.zero_shot.shards=data/00000.tar"],
        ["eval.tasks.zero_shot.classnames is not set"],
    ),
    "a probe without training data": (
        ["eval=linear_probe", "eval.tasks.linear_probe.shards=data/*.tar"],
        ["eval.tasks.linear_probe: ", "set exactly one of train_shards= and train_folder="],
    ),
    "new task": (
        ["+eval.tasks.a={kind:retrieval}"],
        ["eval.tasks.a: ", "an entry of eval.tasks, written as in 'eval.tasks={a: {…}}'"],
    ),
    "unknown class list": (
        [
            "eval=zero_shot",
            "eval.tasks.zero_shot.shards=data/00000.tar",
            "eval.tasks.zero_shot.classnames=openclip:imagnet",
        ],
        ["openclip:imagnet", "openclip:imagenet"],
    ),
    "labels of another data set": (
        zero_shot("data/*.tar", "data/three.txt"),
        ["an image has class 3, but the 3 class names", "eval.tasks.zero_shot.classnames"],
    ),
    "evaluation without labels": (
        zero_shot("bare/0.tar", "data/classnames.txt"),
        ["no cls member", "eval.tasks.zero_shot.shards"],
    ),
    "retrieval by a field that is not there": (
        ["eval=retrieval", "eval.tasks.retrieval.shards=data/*.tar", "eval.tasks.retrieval.caption.field=json.nope"],
        ["json field 'nope' is not text; the record has: captions, n", "eval.tasks.retrieval.caption.field"],
    ),
    "retrieval without captions": (
        ["eval=retrieval", "eval.tasks.retrieval.shards=bare/0.tar"],
        ["no txt member", "eval.tasks.retrieval.caption.field"],
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    colour_shards(folder / "data", [12, 12])
    (folder / "data" / "three.txt").write_text("a\nb\nc\n")
    write_shard(folder / "bare" / "0.tar", [{"png": s["png"]} for s in colour_samples(5)])
    tiny_arch(folder)
    return folder


def fails(
    main: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["clipq-train", *arguments])
    with pytest.raises(SystemExit) as exit_code:
        main()  # pyright: ignore
    assert exit_code.value.code == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert shown.err.startswith("clipq-train: ")
    return shown.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_explained(
    mistake: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = MISTAKES[mistake]
    monkeypatch.chdir(world)
    needs_model = any(o.startswith("model.") for o in overrides)
    if not needs_model:
        monkeypatch.setattr(clipq.build, "build_model", lambda config: pytest.fail("a model was built"))
    arguments = list(overrides)
    if not any(o.startswith(("data=", "data.shards")) for o in overrides):
        arguments.append("data.shards=data/*.tar")
    message = fails(train_command.main, arguments, monkeypatch, capsys)
    for part in expected:
        assert part in message, message
    assert len(message) < 1500
    assert not (world / "runs").exists() or not list((world / "runs").glob("*/checkpoints/*"))


def test_batch_not_divisible(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = ["data.shards=data/*.tar", "batch_size=16"]
    message = fails(train_command.main, arguments, monkeypatch, capsys)
    assert "batch_size=16 is not divisible by the 3 processes" in message
    assert "15" in message
    message = fails(train_command.main, [*arguments, "batch_size=15", "parallel=none"], monkeypatch, capsys)
    assert "parallel=none with 3 processes" in message
    message = fails(train_command.main, [*arguments, "batch_size=15", "accumulation=4"], monkeypatch, capsys)
    assert "batch_size=15 cannot be cut into accumulation=4 equal parts on each of 3 processes" in message
    assert "the nearest that can: 12" in message
    monkeypatch.setenv("WORLD_SIZE", "1")
    message = fails(train_command.main, [*arguments, "accumulation=3"], monkeypatch, capsys)
    assert "batch_size=16 cannot be cut into accumulation=3 equal parts: the nearest that can: 15" in message


@pytest.mark.parametrize(
    ("processes", "on_node", "overrides", "expected"),
    [
        (4, 4, [], "parallel=hsdp (a copy on each node) with 4 processes on one node: that would be one copy"),
        (4, 1, [], "parallel=hsdp (a copy on each node) with 4 processes: each would have a whole copy"),
        (4, 4, ["parallel.replicas=3"], "parallel.replicas=3 with 4 processes: they cannot share 3 copies evenly"),
        (4, 2, ["parallel.replicas=4"], "parallel.replicas=4 with 4 processes: each would have a whole copy"),
    ],
)
def test_copies_that_processes_cannot_share(
    processes: int,
    on_node: int,
    overrides: list[str],
    expected: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
    arguments = ["data.shards=data/*.tar", "batch_size=16", "parallel=hsdp", *overrides]
    message = fails(train_command.main, arguments, monkeypatch, capsys)
    assert expected in message
    assert "choose parallel=" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["checkpoint=no/run", "eval=imagenet", "eval.root=/data"], ["checkpoint=no/run: no such file"]),
        (["eval=imagenet", "eval.root=/data"], ["checkpoint is not set", "a run folder"]),
        (["checkpoint=x"], ["eval has no tasks", "eval=tiny_imagenet"]),
        (["checkpoint=tiny.json", "eval=imagenet", "eval.root=/data"], ["tiny.json"]),
        (["checkpoint=x", "eval=imagenette", "eval.root=/data"], ["eval=imagenette: no such option", "imagenet"]),
        (
            ["checkpoint=x", "model=vit_b_32", *zero_shot("data/*.tar", "data/three.txt")],
            ["an image has class 3, but the 3 class names", "eval.tasks.zero_shot.classnames"],
        ),
    ],
)
def test_evaluation_mistakes(
    arguments: list[str],
    expected: list[str],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    message = fails(eval_command.main, arguments, monkeypatch, capsys)
    for part in expected:
        assert part in message, message


def test_built_in_set_is_rendered_after_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes twenty seconds, which a mistake should not wait for."""
    for mistake in (["optim.lr=-1"], ["optim.lrr=1"], ["backend=fp16", "device=cpu"]):
        assert "rendering" not in fails(train_command.main, ["experiment=demo", *mistake], monkeypatch, capsys)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPQ_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(sys, "argv", ["clipq-train", "experiment=demo"])
    with pytest.raises(SystemExit, match="2"):
        train_command.main()
    assert "clipq-train: cannot write the built-in data set to" in capsys.readouterr().err
    shown = command("train", "experiment=demo", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert f"root: {tmp_path}/file/cache/shapes-" in shown.stdout
    assert "rendering" not in shown.stderr


def test_label_beyond_the_first_samples_is_one_message(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    save_weights(create_model("tiny.json").model, "weights.safetensors")
    samples = [s | {"cls": "0" if n < 100 else "7"} for n, s in enumerate(colour_samples(101))]
    write_shard(world / "late" / "0.tar", samples)
    arguments = ["checkpoint=weights.safetensors", "model=vit_b_32", "model.name=tiny.json", "backend=fp32"]
    arguments += zero_shot("late/0.tar", "data/classnames.txt")
    message = fails(eval_command.main, arguments, monkeypatch, capsys)
    assert "an image has class 7, but the 4 class names" in message


@pytest.mark.parametrize(("good_shards", "code"), [(0, 2), (1, 1)], ids=["before the model", "while training"])
def test_shards_without_captions_end_the_run(tmp_path: Path, good_shards: int, code: int) -> None:
    """A data set whose members have other names would filter every sample: it must not look like a hang."""
    samples = colour_samples(20)
    renamed = [{"png": s["png"], "caption": s["txt"]} for s in samples]
    write_shard(tmp_path / "data" / f"{good_shards}.tar", renamed)
    for number in range(good_shards):
        write_shard(tmp_path / "data" / f"{number}.tar", samples)
    arguments = [f"model.name={tiny_arch(tmp_path)}", "data.shards=data/*.tar", "batch_size=4", "data.workers=1"]
    done = command("train", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == code
    said = done.stderr if code == 2 else done.stdout
    assert f"{good_shards}.tar: it has no sample with jpg;jpeg;png;webp and txt" in said
    assert "caption, png" in said
    assert "Traceback" not in done.stdout + done.stderr
    assert ("parameters" in done.stdout) == (code == 1), "the model is built where the first shard is good"


def test_error_of_another_rank_reaches_the_terminal(tmp_path: Path) -> None:
    """Rank 0 itself only sees that a connection was closed."""
    samples = colour_samples(20)
    write_shard(tmp_path / "data" / "0.tar", samples)
    write_shard(tmp_path / "data" / "1.tar", [s | {"png": b"no image"} for s in samples])
    arguments = [f"model.name={tiny_arch(tmp_path)}", "data.shards=data/*.tar", "batch_size=4", "data.workers=1"]
    # of seed 0 rank 1 begins with shard 1
    done = command_on_two_ranks("train", *arguments, "data.shuffle=1", "data.max_lost=0", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("[rank 1] error: 2 of the last 2 samples could not be read, at last ") == 1


def test_two_ranks_tell_a_mistake_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "0.tar", colour_samples(4))
    arguments = [f"model.name={tiny_arch(tmp_path)}", "batch_size=4", "data.workers=1"]
    done = command_on_two_ranks("train", *arguments, "data.shards=no.tar", cwd=tmp_path)
    assert done.stderr.count("train: no shard matches 'no.tar'") == 1
    assert "rank 1: no shard" not in done.stderr
