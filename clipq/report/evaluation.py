"""One HTML page about the evaluation of a checkpoint: tasks, classes, what is taken for what, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clipq.report.html import document, example_grid
from clipq.report.runs import example_of
from clipq.report.summary import is_chance, is_share, metric_label, percent


def evaluation_page(record: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> str:
    """The whole document, every text escaped.

    Args:
        record: as `clipq.eval.results.record_of` gives it.
        pictures: task -> heading -> images as evaluations keep them.
    """
    about = " · ".join(str(record[key]) for key in ("model", "precision", "recipe"))
    device = record["environment"].get("device")
    head = f'<h1>{escape(str(record["checkpoint"]))}</h1>\n<p class="soft">{escape(f"{about} · {device}")}</p>'
    parts = [f"<header>\n{head}\n</header>", _results(record)]
    for result in record["results"]:
        task = [part for part in (_classes(result), _confusions(result), _pictures(pictures, result["task"])) if part]
        if task:
            parts.append("\n".join(["<section>", f"<h2>{escape(result['task'])}</h2>", *task, "</section>"]))
    return document(f"{record['checkpoint']} · clipq evaluation", parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are plain text, the first of a row its heading."""
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _results(record: Mapping[str, Any]) -> str:
    metrics = list(dict.fromkeys(name for result in record["results"] for name in result["metrics"]))
    shares = [m for m in metrics if is_share(m) or is_chance(m)]
    others = [m for m in metrics if m not in shares]
    rows = []
    for result in record["results"]:
        of = result["metrics"]
        cells = [percent(of[m]) if m in of else "—" for m in shares]
        cells += ["—" if m not in of else f"{of[m]:,}" if isinstance(of[m], int) else f"{of[m]:.3g}" for m in others]
        rows.append([result["task"], *cells])
    text = _table(["", *(metric_label(m) for m in (*shares, *others))], rows)
    for average in record["averages"]:
        value = "—" if average["mean"] is None else percent(average["mean"])
        text += f"\n<p><strong>{escape(average['name'])}</strong>: {value}, the mean of {len(average['of'])} sets"
        text += f"; missing: {escape(', '.join(average['missing']))}" * bool(average["missing"]) + "</p>"
    for task, why in record["missing"].items():
        text += f'\n<p class="note"><strong>{escape(task)}</strong> is missing: {escape(why)}</p>'
    return f"<section>\n<h2>Results</h2>\n{text}\n</section>"


def _classes(result: Mapping[str, Any]) -> str:
    known = [c for c in result.get("classes", ()) if c["top1"] is not None]
    if not known:
        return ""
    known.sort(key=lambda c: c["top1"])
    rows = [[c["name"], percent(c["top1"]), f"{c['images']:,}"] for c in known]
    table = _table(["class", "top-1", "images"], rows)
    return f"<details><summary>All {len(known):,} classes, the worst first</summary>\n{table}\n</details>"


def _confusions(result: Mapping[str, Any]) -> str:
    pairs = result.get("confusions", ())
    if not pairs:
        return ""
    table = _table(["class", "taken for", "images"], [[p["truth"], p["taken_for"], f"{p['images']:,}"] for p in pairs])
    return f"<details><summary>The {len(pairs)} most frequent confusions</summary>\n{table}\n</details>"


def _pictures(pictures: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]], task: str) -> str:
    return "\n".join(
        f"<details><summary>{escape(heading)}</summary>\n{example_grid([example_of(p) for p in some])}\n</details>"
        for heading, some in pictures.get(task, {}).items()
        if some
    )
