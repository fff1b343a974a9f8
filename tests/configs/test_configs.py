"""Every configuration composes; every setting is documented; the set of settings changes only on purpose."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from clipq.config.hydra import composed, configs_dir, field_docs, field_types, register, to_job
from clipq.config.schema import EvalJob, TrainJob

FROZEN = Path(__file__).with_name("options.txt")
GROUPS = sorted(p.name for p in configs_dir().iterdir() if p.is_dir() and p.name != "arch")
OPTIONS = [
    (group, str(path.relative_to(configs_dir() / group).with_suffix("")))
    for group in GROUPS
    for path in sorted((configs_dir() / group).rglob("*.yaml"))
]


def compose_job(kind: type, name: str, *overrides: str) -> Any:
    register({"clipq.synthetic": lambda: "/data/synthetic"})
    return to_job(composed(name, overrides), kind)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda x: x)
def test_every_option_composes(group: str, option: str) -> None:
    given = {"data.shards": "x.tar", "data.root": "/data", "eval.root": "/data", "schedule.cooldown": "5"}
    if option in ("zero_shot", "retrieval", "linear_probe"):
        given[f"eval.tasks.{option}.shards"] = "x.tar"
    if option == "linear_probe":
        given["eval.tasks.linear_probe.train_shards"] = "y.tar"
    if option == "zero_shot":
        given["eval.tasks.zero_shot.classnames"] = "names.txt"
    if (group, option) != ("schedule", "constant_cooldown"):
        del given["schedule.cooldown"]
    if group == "experiment" or (group, option) not in (("data", "webdataset"),):
        given.setdefault("data.shards", "x.tar")
    if group == "experiment" or option == "provoked":
        given.pop("data.shards", None)  # these say what they train on
    if group == "scale":  # which experiments have
        given["experiment"] = "spike" if option == "provoked" else "paper/fig1_precision"
    job = compose_job(TrainJob, "train", f"{group}={option}", *(f"{k}={v}" for k, v in given.items()))
    assert job.steps >= 1
    if group == "experiment":
        assert job.name == Path(option).name, "an experiment names its run folder after itself"
        assert job.data.shards != "x.tar"


def test_evaluation_composes() -> None:
    job = compose_job(EvalJob, "eval", "checkpoint=x", "eval=imagenet", "eval.root=/data", "model=vit_l_14")
    assert job.model.name == "ViT-L-14"
    assert job.eval.tasks["imagenet"].folder == "/data/"


def test_users_add_their_own_folder(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "own.yaml").write_text("name: ViT-B-16\nqk_norm: true\n")
    arguments = ["--config-dir", "mine", "model=own", "data.shards=x.tar", "--cfg", "job", "--resolve"]
    done = subprocess.run(
        [sys.executable, "-m", "clipq.cli.train", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown = OmegaConf.create(done.stdout)
    assert shown.model.name == "ViT-B-16"
    assert shown.model.qk_norm is True
    assert shown.name == "ViT-B-16-webdataset"


def options(kind: type, prefix: str = "") -> list[str]:
    lines = []
    defaults = {f.name: f for f in fields(kind)}
    for name, hint in field_types(kind).items():
        args = getattr(hint, "__args__", ())
        inner = hint if is_dataclass(hint) else next((a for a in args if is_dataclass(a)), None)
        if inner is not None:
            lines += options(inner, f"{prefix}{name}{'' if is_dataclass(hint) else '.<name>'}.")
            continue
        default = defaults[name].default
        value = default.value if isinstance(default, Enum) else default
        if repr(value).startswith("<dataclasses._MISSING"):
            value = defaults[name].default_factory()  # pyright: ignore
        choices = isinstance(hint, type) and issubclass(hint, Enum)
        shown = "|".join(e.value for e in hint) if choices else defaults[name].type
        lines.append(f"{prefix}{name}: {shown} = {value}")
    return lines


def test_option_set_is_frozen() -> None:
    """A new or renamed setting is a promise to users: it shows up here, and CHANGELOG.md says it.

    After a change on purpose: CLIPQ_FREEZE=1 pytest tests/configs
    """
    now = "\n".join(["# clipq-train", *options(TrainJob), "# clipq-eval", *options(EvalJob), ""])
    if os.environ.get("CLIPQ_FREEZE"):
        FROZEN.write_text(now)
    assert now == FROZEN.read_text()


def dataclasses_of(kind: type) -> set[type]:
    found = {kind}
    for hint in field_types(kind).values():
        for inner in (hint, *getattr(hint, "__args__", ())):
            if is_dataclass(inner):
                found |= dataclasses_of(inner)  # pyright: ignore
    return found


@pytest.mark.parametrize("kind", sorted(dataclasses_of(TrainJob) | dataclasses_of(EvalJob), key=lambda c: c.__name__))
def test_every_setting_is_documented(kind: type) -> None:
    missing = {f.name for f in fields(kind)} - set(field_docs(kind))
    assert not missing
