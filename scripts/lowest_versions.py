"""Prints the lowest version of each requirement in pyproject.toml as a pip constraints file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
    match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement)
    if match is None:
        raise SystemExit(f"pyproject.toml: {requirement!r} has no lower bound that can be tested")
    print(f"{match[1]}=={match[2]}")
