"""``everedit report``: the HTML report of a run folder or of a whole sweep."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, terminal


@friendly
def report(folder: Path = typer.Argument(help="A folder that everedit run or everedit sweep wrote.")) -> None:
    """Write report.html for a run or a sweep, finished or not."""
    from everedit.report import is_sweep, write_report, write_sweep_report

    page = write_sweep_report(folder) if is_sweep(folder) else write_report(folder)
    terminal.print(f"report: {page}", soft_wrap=True)
