"""What tests share: shards of drawn pictures, a tiny model, processes, the real photographs where they lie."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as mp
from PIL import Image

REPO = Path(__file__).resolve().parents[1]

TINY_ARCH = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
"""An OpenCLIP architecture that trains some hundred pairs a second on one core."""

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


def picture(colour: str, seed: int, size: int = 16) -> Image.Image:
    """A noisy square of one colour."""
    noise = np.random.default_rng(seed).normal(0, 20, (size, size, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write_shard(path: Path, samples: Sequence[dict[str, bytes | str]]) -> Path:
    """A tar (gzip where the name says so) of samples: extension -> content; keys are numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith(".gz") else "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def colour_samples(count: int, first: int = 0) -> list[dict[str, bytes | str]]:
    """Samples of every kind of member: the colours in turn, number in the caption to tell them apart."""
    samples: list[dict[str, bytes | str]] = []
    for n in range(first, first + count):
        colour = list(COLOURS)[n % len(COLOURS)]
        captions = [f"{colour} {n}", f"a {colour} square {n}"]
        samples.append(
            {
                "png": encode(picture(colour, n)),
                "txt": captions[0],
                "cls": str(n % len(COLOURS)),
                "json": json.dumps({"captions": captions, "n": n}),
            }
        )
    return samples


def colour_shards(folder: Path, counts: Sequence[int]) -> list[str]:
    """Shards with so many samples each, all different, and class names and templates beside them."""
    names, first = [], 0
    for number, count in enumerate(counts):
        names.append(str(write_shard(folder / f"{number:05d}.tar", colour_samples(count, first))))
        first += count
    (folder / "classnames.txt").write_text("".join(f"{c}\n" for c in COLOURS))
    (folder / "templates.txt").write_text("{}\na {} square\n")
    return names


def tiny_arch(folder: Path) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY_ARCH))
    return path


def real_data(*parts: str) -> Path:
    """A folder of the real photographs; skips the test where they are not."""
    root = Path(os.environ.get("CLIPQ_TEST_DATA", str(REPO.parent / "shared" / "data")))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real photographs are not here: {'/'.join(parts)} (set CLIPQ_TEST_DATA)")
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_distributed(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Calls `function(*args)` in processes that see torchrun's environment variables; any failure fails the test."""
    mp.spawn(_as_rank, args=(world_size, free_port(), function, args), nprocs=world_size, join=True)


def _as_rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*args)


def command(name: str, *overrides: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Runs `clipq-<name>` as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"clipq.cli.{name}", *overrides],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )
    if check:
        assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


def command_on_two_ranks(name: str, *overrides: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs `clipq-<name>` under torchrun."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_port", str(free_port()), "-m", f"clipq.cli.{name}", *overrides),
        ],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def start_ranks(world: Path, settings: list[str], ranks: int) -> list[subprocess.Popen]:
    """The trainers of a run, one for each rank, as a scheduler starts them; what they say goes to `world/output`."""
    port, output = str(free_port()), world / "output"
    environments = [{}]
    if ranks > 1:
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
        environments = [shared | {"MASTER_PORT": port, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    with output.open("w") as file:
        return [
            subprocess.Popen(
                [sys.executable, "-m", "clipq.cli.train", *settings],
                cwd=world,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | own,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for own in environments
        ]


def steps_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0


def children(pid: int) -> list[int]:
    """Processes that a process has started and that run."""
    found = [(path / "children").read_text().split() for path in Path(f"/proc/{pid}/task").iterdir()]
    return [int(child) for part in found for child in part]


def read_metrics(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]
