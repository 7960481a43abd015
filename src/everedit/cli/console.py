"""The one place that writes to the terminal: tables, progress, errors, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = [
    "LiveTable",
    "ProgressReporter",
    "friendly",
    "say",
    "show_json",
    "show_table",
    "show_text",
    "showing_live",
    "showing_progress",
    "terminal",
]

Command = TypeVar("Command", bound=Callable[..., Any])
terminal = Console()
_errors = Console(stderr=True)
INTERRUPTED = 130


def show_json(value: Any) -> None:
    """Write a value as JSON to standard output, for machines."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def say(text: str, *, aside: bool = False) -> None:
    """Write a text in one piece, since what is cut in two cannot be copied; ``aside``, on standard error."""
    (_errors if aside else terminal).print(text, soft_wrap=True, markup=False, highlight=False)


def show_text(text: str) -> None:
    """Write a text to standard output as it is, for files and pipes."""
    sys.stdout.write(text)


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], *, short: bool = True) -> None:
    """Show a table; numbers with three digits behind the point, a dash where there is nothing.

    ``short`` tells that the first column holds names, which are not broken into lines.
    """
    terminal.print(_table(title, columns, rows, short=short))


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], *, short: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        # The first column names the row: it must be readable, and searchable, on a narrow terminal too.
        # Nothing is cut off for want of room: a number without its end is another number.
        table.add_column(column, no_wrap=index == 0 and short, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def friendly(command: Command) -> Command:
    """Turn errors raised on purpose into one clear message and exit code 1; an interruption into 130."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from everedit.errors import EvereditError

        try:
            return command(*args, **kwargs)
        except EvereditError as error:
            # Not wrapped: a path that is cut in two cannot be copied or searched for.
            where = f" ({_plain(error.where)})" if error.where else ""
            _errors.print(f"[bold red]error:[/] {_plain(error.what)}{where}", soft_wrap=True)
            if error.fix:
                _errors.print(f"  [bold]what to do:[/] {_plain(error.fix)}", soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            _errors.print("[bold yellow]interrupted[/]; nothing half-done was kept")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped  # type: ignore[return-value]


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class ProgressReporter:
    """Shows a run's stages as progress bars with a running note."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def stage(self, text: str, total: int | None = None) -> None:
        """Close the present bar and open one for the next stage."""
        self._close()
        self._task = self._progress.add_task(text, total=total, note="")

    def step(self, done: int, note: str = "") -> None:
        """Move the present bar to ``done``."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, note=note)

    def _close(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[self._task]
            # Also a stage with nothing to do is over, for instance one whose result was in the cache.
            done = max(task.completed, 1)
            self._progress.update(self._task, total=done, completed=done)

    def end(self) -> None:
        """Close the last bar."""
        self._close()


@contextmanager
def showing_progress() -> Iterator[ProgressReporter]:
    """Show progress on standard error while the block runs, so that standard output stays clean."""
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_errors) as progress:
        reporter = ProgressReporter(progress)
        yield reporter
        reporter.end()


class LiveTable:
    """A table that changes while work goes on, with lines above it that stay."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def say(self, line: str) -> None:
        """Write a line that stays."""
        _errors.print(_plain(line), soft_wrap=True)

    def show(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        """Show the table as it is now."""
        self._live.update(_table(title, columns, rows, short=False))


@contextmanager
def showing_live() -> Iterator[LiveTable]:
    """Show a changing table on standard error while the block runs; where there is no terminal, only its lines."""
    with Live(console=_errors, transient=True, refresh_per_second=4) as live:
        yield LiveTable(live)
