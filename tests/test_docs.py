"""The documentation: links lead somewhere, and the README's table says what the recorded results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from clipq.optim import FixedLossScaler

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def test_the_pages_say_what_was_recorded() -> None:
    check = subprocess.run([sys.executable, ROOT / "scripts" / "results.py", "pages", "--check"], timeout=60)
    assert check.returncode == 0, "run python scripts/results.py pages"
    assert "| Tiny ImageNet" in (ROOT / "README.md").read_text(), "the table is there at all"


def test_the_optimizer_in_another_training_script() -> None:
    """The example of docs/stability.md."""
    code, loop = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "stability.md").read_text(), re.S)
    model = torch.nn.Linear(3, 1)
    names = {"model": model}
    exec(code, names)
    optimizer, before = names["optimizer"], model.weight.detach().clone()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert optimizer.rms[model.weight].item() == pytest.approx(1, rel=1e-3)
    optimizer.zero_grad()
    names |= {"loss": model(torch.randn(8, 3)).square().mean(), "scaler": FixedLossScaler(model.named_parameters())}
    before = model.weight.detach().clone()
    exec(loop, names)
    assert 0 < (model.weight - before).abs().max() < 0.1


def test_the_two_lines_for_other_training_scripts_work() -> None:
    """The example of docs/low_precision.md, on a plain ViT of timm."""
    page = (ROOT / "docs" / "low_precision.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    names = {"model": model}
    exec(code, names)
    report = names["report"]
    assert len(report.converted) == 4 * len(model.blocks)
    assert "head" in report.kept
    loss = model(torch.randn(2, 3, 32, 32)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
