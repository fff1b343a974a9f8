"""What evaluations of a checkpoint found, as one record (JSON) and as a table of several records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clipq.eval.common import EvalResult, shown


def record_of(
    facts: Mapping[str, Any],
    results: Sequence[EvalResult],
    averages: Mapping[str, Sequence[str]],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """What is written of one checkpoint.

    Args:
        facts: what was evaluated, by what and where.
        averages: name -> tasks.
        missing: tasks whose data were not there -> why.

    Returns:
        `facts`, then "results", a dictionary for each task that was evaluated; "averages", each of which says the
        metric of every task that it is a mean of, and which of its tasks are missing; and "missing".
    """
    main = {result.task: result.main for result in results}
    return {
        **facts,
        "results": [
            {
                "task": r.task,
                "kind": r.kind,
                "metrics": r.metrics,
                "main": r.main[0],
                **({"classes": r.classes, "confusions": r.confusions} if r.classes else {}),
            }
            for r in results
        ],
        "averages": [_average(name, tasks, main) for name, tasks in averages.items()],
        "missing": dict(missing),
    }


def _average(name: str, tasks: Sequence[str], main: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    there = [task for task in tasks if task in main]
    return {
        "name": name,
        "mean": statistics.fmean(main[task][1] for task in there) if there else None,
        "of": {task: main[task][0] for task in there},
        "missing": [task for task in tasks if task not in main],
    }


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each metric of each task, average and missing task; a column for each record, by its name."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, record in records.items():
        for line, value in _lines(record):
            found.setdefault(line, {})[name] = value
    heads = ["value"] if len(records) == 1 else list(records)
    rows = [["task", "metric", *heads]]
    rows += [[*line, *(values.get(name, "–") for name in records)] for line, values in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(map(_padded, row, widths, range(len(row)))) for row in rows)


def _padded(cell: str, width: int, column: int) -> str:
    return f"{cell:<{width}}" if column < 2 else f"{cell:>{width}}"


def _lines(record: Mapping[str, Any]) -> list[tuple[tuple[str, str], str]]:
    lines = []
    for result in record["results"]:
        for name, value in result["metrics"].items():
            lines.append(((result["task"], name), shown(name, value)))
    lines += [((task, "missing"), "–") for task in record["missing"]]
    for average in record["averages"]:
        value = "–" if average["mean"] is None else shown("mean", average["mean"])
        lines.append(((average["name"], of_how_many(average)), value))
    return lines


def of_how_many(average: Mapping[str, Any]) -> str:
    """`mean of top1, mean_r1 of 18 of 20 sets`: what an average is of."""
    metrics = ", ".join(dict.fromkeys(average["of"].values())) or "nothing"
    there = len(average["of"])
    whole = there + len(average["missing"])
    return f"mean of {metrics} of {there if there == whole else f'{there} of {whole}'} sets"
