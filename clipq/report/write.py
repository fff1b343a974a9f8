"""Writes the report of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipq.report.runs import Run, read_runs


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Reads the run folders and writes their report into the folder `out`, which is made where it is missing.

    Writes `index.html` (complete in itself), `summary.md`, `summary.csv` and one PNG for each plot; files of
    the same names are replaced, others left alone. In a job of several processes, call it on one of them.

    Returns:
        The absolute path of the page.

    Raises:
        RunError: a path is not a run folder, or a run has no training rows yet.
        OSError: a file cannot be read or written.
    """
    return write_files(read_runs(runs), out)


def write_files(runs: Sequence[Run], out: Path) -> Path:
    """`write_report` for runs that have been read already. Returns the absolute path of the page."""
    from clipq.report.page import page
    from clipq.report.plots import draw
    from clipq.report.stability import parts
    from clipq.report.tables import csv_table, markdown_table

    out.mkdir(parents=True, exist_ok=True)
    plots, stability = draw(runs), parts(runs)
    for plot in [*plots, *(part.plot for part in stability if part.plot is not None)]:
        (out / f"{plot.name}.png").write_bytes(plot.png)
    (out / "summary.md").write_text(markdown_table(runs), encoding="utf-8")
    (out / "summary.csv").write_text(csv_table(runs), encoding="utf-8")
    target = out / "index.html"
    target.write_text(page(runs, plots, stability), encoding="utf-8")
    return target.resolve()
