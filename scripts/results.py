"""Keeps measured results in docs/benchmarks/ as JSON, and the README's tables as what those files say.

results.py record runs/demo --name demo_cpu --title "Built-in set" --command "clipq-train experiment=demo"
results.py readme            # rewrites the tables of README.md
results.py readme --check    # fails where they differ
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from clipq.report.runs import read_run
from clipq.report.summary import compare, count, duration, percent

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- results: made by scripts/results.py -->", "<!-- end of results -->"


def record(run: Path, name: str, title: str, command: str, commit: str | None) -> Path:
    """Writes the numbers of a finished run folder to docs/benchmarks/<name>.json.

    Command and commit say what was run; the folder's own configuration stays out, for its paths are of one machine.
    """
    data = read_run(run)
    environment = {**data.environment, "command": command}
    if commit is not None:
        environment["commit"] = commit
    if not environment["commit"] or environment["commit"].endswith("+"):
        raise SystemExit(f"{run}: made from code without a commit; commit first, or name one with --commit")
    values = {line.key: line.values[0] for line in compare([data])}
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "kind": "run", "environment": environment, "values": values}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of recorded runs."""
    rows = ["| run | device | result | images/s | waiting for data | training time |", "|---|---|---|---|---|---|"]
    for result in results:
        values, environment = result["values"], result["environment"]
        rows.append(
            f"| {result['title']} | {environment['device']} | {_accuracy(values)} | "
            f"{count(values['images_per_second'])} | {percent(values['data_wait'])} | {duration(values['seconds'])} |"
        )
    return "\n".join(rows)


def _accuracy(values: dict[str, float]) -> str:
    shown = {
        "top1": "top-1",
        "top5": "top-5",
        "chance": "chance",
        "image_to_text_r1": "image→text R@1",
        "text_to_image_r1": "text→image R@1",
        "text_to_image_r10": "text→image R@10",
    }
    parts = []
    for key, value in values.items():
        _, _, metric = key.partition("/")
        if not metric or value is None:
            continue
        if metric in shown:
            parts.append(f"{shown[metric]} {percent(value)}")
        elif metric.endswith("_top1"):
            parts.append(f"{metric.removesuffix('_top1').replace('_', ' ')} {percent(value)}")
    return ", ".join(parts)


def readme(*, check: bool) -> int:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    results = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.json"))]
    new = f"{before}{BEGIN}\n{table([r for r in results if r['kind'] == 'run'])}\n{END}{after}"
    if check:
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("run", type=Path)
    recorder.add_argument("--name", required=True)
    recorder.add_argument("--title", required=True)
    recorder.add_argument("--command", required=True, help="what a reader types to get the same")
    recorder.add_argument("--commit", help="for a run on a machine that had the code without its history")
    commands.add_parser("readme").add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.action == "record":
        print(record(args.run, args.name, args.title, args.command, args.commit))
        return 0
    return readme(check=args.check)


if __name__ == "__main__":
    sys.exit(main())
