"""The run folder: configuration, environment, and whether a changed configuration may go on in it."""

from __future__ import annotations

import datetime
import fnmatch
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import clipq
from clipq.config.checks import ConfigError

# What a run cannot change on the way: the weights would not fit, or "step" and "sample" would mean something else.
# Shards are told apart by their names when the checkpoint is read (build.py): their folder may change.
FIXED = (
    "model.name",
    "model.image_size",
    "model.layer_scale_init",
    "model.qk_norm",
    "data.shuffle",
    "data.image",
    "data.caption.field",
    "data.caption.field.*",
    "data.filter.*",
    "data.sources.*.image",
    "data.sources.*.caption.field",
    "data.sources.*.caption.field.*",
    "data.sources.*.filter",
    "data.sources.*.filter.*",
    "data.sources.*.passes",
    "batch_size",
    "seed",
)
# What says nothing about the training itself: a change is not worth a warning.
FREE = (
    "log",
    "eval",
    "checkpoint",
    "resume",
    "runs",
    "name",
    "dry_run",
    "gpus",
    "data.root",
    "data.prefetch",
    "data.workers",
    "model.pretrained",
)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        at = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{at}.")
        else:
            flat[at] = value
    return flat


def flatten_yaml(config: str) -> dict[str, Any]:
    """A configuration (YAML) as dotted keys."""
    return flatten(yaml.safe_load(config))


def changes(old: str, new: str) -> list[str]:
    """What differs between two configurations (YAML) in the settings of the training, as `key: old -> new`.

    Raises:
        ConfigError: a setting differs that a run cannot change on the way.
    """
    before, after = flatten_yaml(old), flatten_yaml(new)
    differing = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    lines = {k: f"{k}: {before.get(k)} -> {after.get(k)}" for k in differing}
    fixed = [lines[k] for k in differing if any(fnmatch.fnmatchcase(k, f) for f in FIXED)]
    if fixed:
        raise ConfigError(
            "this run folder was begun with other settings, and its checkpoint cannot go on with these: "
            + "; ".join(fixed)
            + ". Choose another name=, or put them back"
        )
    return [line for k, line in lines.items() if not any(k == f or k.startswith(f"{f}.") for f in FREE)]


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, device and commit, for whoever reads the results later."""
    on_gpu = device.type == "cuda"
    return {
        "clipq": clipq.__version__,
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "open_clip_torch": _version("open_clip_torch"),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "device_count": torch.cuda.device_count() if on_gpu else os.cpu_count(),
        "world_size": world_size,
    }


def write_folder(folder: Path, config: str, facts: dict[str, Any]) -> None:
    """Writes config.yaml and environment.json."""
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that clipq runs from, `+` where it has changes; None for an installed package."""
    root = Path(clipq.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
