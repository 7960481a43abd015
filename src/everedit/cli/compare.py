"""``everedit compare``: two runs over the same edits, and whether they differ by more than chance."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, show_json, show_table, terminal
from everedit.cli.summarize import Moment


@friendly
def compare(
    first: Path = typer.Argument(help="A run folder, for instance a cell of a sweep."),
    second: Path = typer.Argument(help="Another one, over the same data."),
    at: int | None = typer.Option(None, help="After how many edits. [the last number that both were scored at]"),
    score: Moment = typer.Option(Moment.RETAINED, help="Which scores are compared; see everedit summarize."),
    json: bool = typer.Option(False, "--json", help="Write the comparison as JSON to standard output."),
) -> None:
    """Compare the scores of the edits that both runs made, pair by pair, with a sign-flip permutation test."""
    from everedit.report.compare import compare as compared

    found = compared(first, second, mark=at, when=score.value)
    if json:
        show_json(found.as_dict())
        return
    terminal.print(f"A: {found.first}\nB: {found.second}", soft_wrap=True)
    terminal.print(f"{found.common} edits in common; {found.when} scores after {found.mark} edits", soft_wrap=True)
    if found.differ:
        show_table("They differ in", ("setting", "A", "B"), [(key, *values) for key, values in found.differ.items()])
    for protocol in dict.fromkeys(row.protocol for row in found.rows):
        rows = [
            (
                row.metric,
                f"{row.test.first:.3f}",
                f"{row.test.second:.3f}",
                f"{row.test.difference:+.3f}",
                f"{row.test.low:+.2f} {row.test.high:+.2f}",
                f"{row.test.better}/{row.test.worse}/{row.test.same}",
                _p(row.test.p) + ("*" if row.adjusted < 0.05 else ""),
            )
            for row in found.rows
            if row.protocol == protocol
        ]
        columns = ("metric", "A", "B", "B - A", "95%", "+/-/=", "p")
        show_table(protocol, columns, rows)
    terminal.print(
        "95%: bootstrap interval of B - A; +/-/=: edits better, worse, the same in B; p: two-sided, signs of the "
        "differences flipped; *: below 0.05 when adjusted for all rows of all tables here (Holm)",
        soft_wrap=True,
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
