from __future__ import annotations

import pytest

from clipq.config.checks import ConfigError
from clipq.log.folder import changes

OLD = "steps: 10\nbatch_size: 16\noptim:\n  lr: 0.1\n  name: adamw\nseed: 1\nlog:\n  every: 5\n"
OLD += "data:\n  shards: a.tar\n  sources:\n    b:\n      passes: 3\n      weight: 4.0\n"
OLD += "      caption:\n        field: txt\n"


def test_changes_are_told_by_their_weight() -> None:
    new = OLD.replace("lr: 0.1", "lr: 0.2").replace("every: 5", "every: 1").replace("steps: 10", "steps: 20")
    assert changes(OLD, new) == ["optim.lr: 0.1 -> 0.2", "steps: 10 -> 20"]
    assert changes(OLD, OLD) == []
    assert changes(OLD, OLD.replace("4.0", "2.0")) == ["data.sources.b.weight: 4.0 -> 2.0"]
    assert changes(OLD, OLD.replace("a.tar", "/moved/a.tar")) == ["data.shards: a.tar -> /moved/a.tar"]


@pytest.mark.parametrize(
    "change",
    [("batch_size: 16", "batch_size: 8"), ("seed: 1", "seed: 2"), ("passes: 3", "passes: 5"), ("txt", "json.a")],
)
def test_what_cannot_change(change: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{change[0].split()[-1]} -> {change[1].split()[-1]}.*name="):
        changes(OLD, OLD.replace(*change))
