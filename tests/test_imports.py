"""Modules import only downward: the layers of docs/architecture.md, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import clipq

LAYERS = [
    *(
        "cli",
        "build",
        "build_eval",
        "build_parallel",
        "build_backend",
        "build_data",
        "build_watch",
        "train",
        "eval",
        "report",
        "watch",
        "model",
        "lowp",
        "optim",
        "loss",
        "data",
        "dist",
        "log",
    ),
    *("kernels", "config"),
]
PACKAGE = Path(clipq.__file__).parent


def layer(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            found.add(node.module or "")
    return {m for m in found if m.startswith("clipq.")}


def test_imports_point_downward() -> None:
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if len(parts) == 2 and parts[1] == "__init__":
            continue
        own = LAYERS.index(layer(".".join(parts)))
        for module in imports(path):
            theirs = LAYERS.index(layer(module))
            checked += 1
            assert theirs >= own, f"{'.'.join(parts)} imports {module}, which lies above it"
    assert checked > 40


def test_configuration_imports_nothing_of_clipq() -> None:
    """A mistake in the configuration is told before torch is imported."""
    for name in ("choices", "groups", "evaluation", "watch", "schema"):
        assert all(m.startswith("clipq.config.") for m in imports(PACKAGE / "config" / f"{name}.py"))


def test_the_library_needs_nothing_else_of_clipq() -> None:
    """What others take into their own training code."""
    library = {"lowp", "optim", "kernels"}
    files = [path for name in library for path in (PACKAGE / name).rglob("*.py")]
    assert len(files) > 20
    for path in files:
        assert {layer(module) for module in imports(path)} <= library, path
