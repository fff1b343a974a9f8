from __future__ import annotations

import pytest

from clipq.config.checks import ConfigError
from clipq.log.folder import changes

OLD = "steps: 10\nbatch_size: 16\noptim:\n  lr: 0.1\n  name: adamw\nseed: 1\nlog:\n  every: 5\n"
OLD += "data:\n  shards: a.tar\n  sources:\n    b:\n      passes: 3\n      weight: 4.0\n"
OLD += "      caption:\n        field: txt\n"
OLD += "      filter: null\n  caption:\n    field:\n      txt: 0.5\n      json.b: 0.5\n"
OLD += "  filter:\n    min_size: 3\n    json:\n      similarity:\n      - 0.25\n"


def test_changes_are_told_by_their_weight() -> None:
    new = OLD.replace("lr: 0.1", "lr: 0.2").replace("every: 5", "every: 1").replace("steps: 10", "steps: 20")
    assert changes(OLD, new) == ["optim.lr: 0.1 -> 0.2", "steps: 10 -> 20"]
    assert changes(OLD, OLD) == []
    assert changes(OLD, OLD.replace("4.0", "2.0")) == ["data.sources.b.weight: 4.0 -> 2.0"]
    assert changes(OLD, OLD.replace("a.tar", "/moved/a.tar")) == ["data.shards: a.tar -> /moved/a.tar"]


@pytest.mark.parametrize(
    "change",
    [
        *(("batch_size: 16", "batch_size: 8"), ("seed: 1", "seed: 2"), ("passes: 3", "passes: 5")),
        *(("field: txt", "field: json.a"), ("txt: 0.5", "txt: 0.4"), ("min_size: 3", "min_size: 4")),
    ],
)
def test_what_cannot_change(change: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{change[0].split()[-1]} -> {change[1].split()[-1]}.*name="):
        changes(OLD, OLD.replace(*change))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("      - 0.25", "      - 0.3", r"data\.filter\.json\.similarity: \[0\.25\] -> \[0\.3\]"),
        ("filter: null", "filter:\n        min_size: 3", r"data\.sources\.b\.filter\.min_size: None -> 3"),
        ("      json.b: 0.5\n", "", r"data\.caption\.field\.json\.b: 0\.5 -> None"),
    ],
)
def test_filters_and_fields_cannot_change(old: str, new: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"{says}.*name="):
        changes(OLD, OLD.replace(old, new))
