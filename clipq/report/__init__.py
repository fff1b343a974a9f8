"""Reports: run folders in; tables, PNG plots and one HTML page out. Needs neither torch nor a GPU."""

from clipq.report.runs import Run, RunError, read_run, read_runs
from clipq.report.write import write_report

__all__ = ["Run", "RunError", "read_run", "read_runs", "write_report"]
