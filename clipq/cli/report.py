"""`clipq-report`: tables, plots and a page about one or several runs, or a figure from its JSON file."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from clipq.cli.arguments import Parser, fail

EXAMPLE = """\
examples:
  clipq-report runs/my-run                     writes runs/my-run/report/
  clipq-report runs/adamw runs/stable_adamw    writes report/, every curve of both on the same axes
  clipq-report runs/* --out reports/sweep      writes reports/sweep/
  clipq-report docs/results/fig1.json          draws a figure again: docs/results/fig1.png and fig1.md

A run may be reported while it trains. A report is index.html, which is complete in itself and can be sent
to someone, the plots as PNG, summary.md and summary.csv.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report, prints the table and, on the last line, the absolute path of the page.

    Returns:
        The exit status: 0, or 2 where the input or the output folder is wrong (one line on stderr says how).
    """
    arguments = _parser().parse_args(argv)
    # Imported here so that --help and wrong usage answer at once.
    from clipq.report.figure import FigureError, write_figure
    from clipq.report.runs import RunError, read_runs
    from clipq.report.tables import console_table
    from clipq.report.write import write_files

    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a terminal that lacks a letter gets a question mark, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    figures = [path for path in arguments.runs if path.suffix == ".json"]
    if figures and len(figures) < len(arguments.runs):
        return fail("clipq-report", "figures (.json) and run folders are given together: name the ones, or the others")
    try:
        if figures:
            for path in figures:
                print(write_figure(path, arguments.out).resolve())
            return 0
        runs = read_runs(arguments.runs)
        out = arguments.out or (runs[0].path / "report" if len(runs) == 1 else Path("report"))
        target = write_files(runs, out)
    except (RunError, FigureError) as error:
        return fail("clipq-report", str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(
            "clipq-report", f"{where}{error.strerror or error}: check --out, the folder's permissions and the disk"
        )
    print(console_table(runs))
    print()
    print(target)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="clipq-report",
        description="Tables, plots and one HTML page about one or several training runs.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, as runs/<name>; or the JSON file of a figure"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: RUN/report for one run, ./report for several, beside it for a figure)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
