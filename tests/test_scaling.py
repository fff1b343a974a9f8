"""The model of docs/scaling.md: its sizes against built models, its limits, and that the page says what it computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import scaling  # noqa: E402


def test_sizes_are_those_of_the_built_model() -> None:
    model = open_clip.create_model("ViT-B-32")
    found = scaling.model_of("ViT-B-32")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.blocks == len(model.visual.transformer.resblocks) + len(model.transformer.resblocks)
    assert found.features == model.text_projection.shape[1]


@pytest.mark.parametrize("strategy", scaling.STRATEGIES)
def test_more_gpus_and_slower_networks_never_help(strategy: str) -> None:
    model, slow = scaling.model_of("ViT-H-14"), scaling.Cluster(network=5.0)
    steps = [scaling.predict(model, strategy, n, 256, 0.3, scaling.Cluster(), 4.0) for n in (8, 16, 64, 1024)]
    assert all(0 < s.worst <= s.best <= 1 for s in steps)
    assert [s.worst for s in steps] == sorted((s.worst for s in steps), reverse=True)
    assert [s.best for s in steps] == sorted((s.best for s in steps), reverse=True)
    assert scaling.predict(model, strategy, 64, 256, 0.3, slow, 4.0).worst < steps[2].worst


def test_what_is_sent() -> None:
    model, cluster = scaling.Model(parameters=1000, blocks=1, features=8), scaling.Cluster(per_node=4)
    sent = {s: scaling.weights_and_gradients(model, s, 8, cluster, 2.0)[0] for s in scaling.STRATEGIES}
    assert sent["ddp"] == 2 * 7 / 8 * 4000  # a ring's sum: once around to add, once to tell
    assert sent["fsdp"] == 7 / 8 * (2000 + 2000 + 4000)  # weights twice, gradients once
    assert sent["hsdp"] == 3 / 4 * 8000 + 2 * 1 / 2 * 1000  # as fsdp in a node of 4; a quarter's sum over 2 nodes
    eight = scaling.weights_and_gradients(model, "fsdp", 8, cluster, 1.0)[0]
    assert eight == 7 / 8 * (1000 + 1000 + 4000)


def test_the_page_says_what_is_computed() -> None:
    check = subprocess.run([sys.executable, ROOT / "scripts" / "scaling.py", "--check"], timeout=120)
    assert check.returncode == 0, "run python scripts/scaling.py"
