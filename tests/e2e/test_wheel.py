"""A wheel holds all that a checkout does: configurations, architectures, the page's style."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import REPO, colour_shards, read_metrics, tiny_arch


@pytest.mark.slow
def test_installed_wheel_trains_as_the_checkout_does(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=REPO,
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    in_repo = {str(p.relative_to(REPO)) for p in (REPO / "configs").rglob("*") if p.is_file()}
    in_wheel = {str(p.relative_to(tmp_path / "site" / "clipq")) for p in (tmp_path / "site").rglob("configs/**/*")}
    assert in_repo <= in_wheel
    assert (tmp_path / "site/clipq/lowp/tables/nvidia_h100_80gb_hbm3.json").is_file()

    colour_shards(tmp_path / "data", [30, 30])
    tiny_arch(tmp_path)
    losses = []
    for name, path in (("wheel", tmp_path / "site"), ("checkout", REPO)):
        code = (
            "import clipq, sys; assert clipq.__file__.startswith(sys.argv.pop(1)), clipq.__file__;"
            "from clipq.cli.train import main; main()"
        )
        arguments = ["model.name=tiny.json", "data.shards=data/*.tar", "batch_size=8", "steps=3", "data.workers=1"]
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), *arguments, f"name={name}", "backend=fp32"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in read_metrics(tmp_path / "runs" / name)])
    assert losses[0] == losses[1]
