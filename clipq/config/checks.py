"""What is wrong with a setting, in words."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A setting is wrong; the message says which, what was expected and how to mend it."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def strings(name: str, value: Any) -> None:
    """Accepts one string or a non-empty list of strings: Hydra has no such union type."""
    ok = isinstance(value, str) or (
        isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)
    )
    require(ok, f"{name}={value!r}: expected a path, a pattern or a list of them")
