"""``everedit report``: the HTML report of a run folder."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, terminal


@friendly
def report(run_folder: Path = typer.Argument(help="A folder that everedit run wrote.")) -> None:
    """Write report.html for a run folder, finished or not."""
    from everedit.report import write_report

    terminal.print(f"report: {write_report(run_folder)}", soft_wrap=True)
