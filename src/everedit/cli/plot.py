"""``everedit plot``: curves over many runs, as SVG files."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, terminal
from everedit.cli.summarize import Moment


@friendly
def plot(
    folders: list[Path] = typer.Argument(help="Run folders, sweep folders, or folders of such folders."),
    out: Path = typer.Option(Path("plots"), help="The folder of the SVG files."),
    score: Moment = typer.Option(Moment.RETAINED, help="Which scores the curves show; see everedit summarize."),
    protocol: list[str] = typer.Option([], help="Only these protocols; may be given several times."),
) -> None:
    """Draw scores against T with 95% bands, retention, growth of norms and singular values, time and memory."""
    from everedit.errors import EvereditError
    from everedit.report import can_report
    from everedit.report.collect import collect
    from everedit.report.sweep_figures import save_figures

    if not can_report():
        raise EvereditError(what="plots need a package that is not installed", fix="pip install 'everedit[report]'")
    for file in save_figures(collect(folders), out, score.value, protocol):
        terminal.print(str(file), soft_wrap=True)
