"""The documentation: links lead somewhere, and the README's table says what the recorded results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def test_the_readme_says_what_was_recorded() -> None:
    check = subprocess.run([sys.executable, ROOT / "scripts" / "results.py", "readme", "--check"], timeout=60)
    assert check.returncode == 0, "run python scripts/results.py readme"
    assert "| Tiny ImageNet" in (ROOT / "README.md").read_text(), "the table is there at all"
