"""The comparison of runs as text: for the console, as Markdown and as CSV."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from itertools import groupby

from clipq.report.runs import Run
from clipq.report.summary import Quantity, compare, settings


def console_table(runs: Sequence[Run]) -> str:
    """Lines of text, one column for each run, values aligned to the right."""
    rows: list[tuple[str, ...]] = []
    for group, lines in _groups(compare(runs)):
        rows.append((group,))
        rows += [("  " + line.label, *_cells(line, len(runs))) for line in lines]
    header = ("", *(run.name for run in runs))
    table = [header, *rows]
    first = max(len(row[0]) for row in table)
    widths = [max(len(row[i]) for row in table if len(row) > 1) for i in range(1, len(header))]
    out = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths, strict=False)]
        out.append("  ".join([row[0].ljust(first), *cells]).rstrip())
    out += [f"note: {run.name}: {note}" for run in runs for note in run.notes]
    return "\n".join(out)


def markdown_table(runs: Sequence[Run]) -> str:
    """A Markdown document: the comparison, the settings that differ, the notes."""
    names = [markdown_text(run.name) for run in runs]
    parts = [f"# {', '.join(names)}", _markdown_head("", names)]
    for group, lines in _groups(compare(runs)):
        parts[-1] += markdown_row(f"**{markdown_text(group)}**", [""] * len(runs))
        for line in lines:
            parts[-1] += markdown_row(markdown_text(line.label), _cells(line, len(runs)))
    different = [(name, values) for name, values, differs in settings(runs) if differs]
    if different:
        parts += ["## Settings that differ", _markdown_head("setting", names)]
        for name, values in different:
            cells = ["—" if value is None else markdown_text(value) for value in values]
            parts[-1] += markdown_row(markdown_text(name), cells)
    notes = [f"- {markdown_text(run.name)}: {markdown_text(note)}" for run in runs for note in run.notes]
    if notes:
        parts += ["## Notes", "\n".join(notes)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def csv_table(runs: Sequence[Run]) -> str:
    """One line for each run with every value at full precision; shares are in [0, 1], times in seconds."""
    lines = compare(runs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *(line.key for line in lines)])
    for index, run in enumerate(runs):
        values = [line.values[index] for line in lines]
        writer.writerow([run.name, *("" if v is None else int(v) if v.is_integer() else repr(v) for v in values)])
    return text.getvalue()


def _groups(lines: Sequence[Quantity]) -> list[tuple[str, list[Quantity]]]:
    return [(group, list(members)) for group, members in groupby(lines, key=lambda line: line.group)]


def _cells(line: Quantity, runs: int) -> list[str]:
    return [line.text(index) for index in range(runs)]


def markdown_text(text: str) -> str:
    """Text as it is, in a cell of a table too."""
    return html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _markdown_head(first: str, names: Sequence[str]) -> str:
    return markdown_row(first, names) + markdown_row("---", ["---:"] * len(names))


def markdown_row(first: str, cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join([first, *cells]) + " |\n"
