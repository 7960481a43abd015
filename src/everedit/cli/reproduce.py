"""``everedit reproduce``: the headline table of a paper, and line by line what was expected and what was found."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everedit.cli.console import friendly, show_json, show_table, terminal
from everedit.cli.sweep import begin_sweep, execute, report_of, show_plan, show_states

if TYPE_CHECKING:
    from everedit.experiments.recipes import Form, Line


@friendly
def reproduce(
    name: str | None = typer.Argument(None, help="Which table; without a name, those that there are."),
    small: bool = typer.Option(False, "--small", help="A short form for a small model, on this machine."),
    model: list[str] = typer.Option([], help="Other models than the recipe's; may be given several times."),
    data: Path | None = typer.Option(None, help="The folder of the data sets that do not ship with Everedit."),
    checkpoint: list[str] = typer.Option([], metavar="NAME=FOLDER", help="Of a method that is trained first."),
    out: Path | None = typer.Option(None, help="The sweep's folder. [runs/reproduce-NAME]"),
    setting: list[str] = typer.Option([], "--set", help="key=value for all cells; wins over the recipe."),
    jobs: int = typer.Option(1, min=1, help="How many cells are made at a time."),
    threads: int | None = typer.Option(None, min=1, help="Threads a cell computes with. [all cores / jobs]"),
    gpus: str | None = typer.Option(None, help="GPUs to use, one cell on each: 0,1. With --ray, GPUs a cell."),
    ray: str | None = typer.Option(
        None, metavar="[ADDRESS]", help="On a Ray cluster: HOST:PORT, auto or, without a value, a Ray on this machine."
    ),
    plan: bool = typer.Option(False, "--plan", help="Show the cells and what they would cost, and stop."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the reproduction in --out."),
    json: bool = typer.Option(False, "--json", help="Write the lines as JSON to standard output."),
) -> None:
    """Make a paper's headline table, at full size or small, and hold what was found against what it claims."""
    from everedit.experiments.recipes import conclude, recipe
    from everedit.experiments.sweeps import cells_of

    if name is None:
        _list(json=json)
        return
    chosen = recipe(name)
    form: Form = "small" if small else "full"
    ready = chosen.ready(name, form, data=data, models=model, checkpoints=_folders(checkpoint), settings=setting)
    cells = cells_of(ready.sweep, f"recipe {name}", setting)
    if not json:
        _introduce(chosen.title, chosen.paper, chosen.about, ready.notes)
    if plan:
        show_plan(cells, ready.sweep.kind, jobs, json=json)
        return
    place = out or Path("runs") / f"reproduce-{name}{'-small' if small else ''}"
    begin, threads = begin_sweep(place, ready.sweep, cells, chosen.source(name), threads, jobs, resume=resume)
    words = [*sys.argv[1:], *(() if resume else ("--resume",))]
    again = shlex.join(["everedit", *words])
    folder, states = execute(begin, threads, jobs, gpus=gpus, ray=ray, again=again)
    lines = conclude(chosen, name, form, folder.path, ready.notes)
    report = report_of(folder.path)
    if json:
        cells_ended = [state.as_dict() for state in states]
        told = {"out": str(folder.path), "cells": cells_ended, "lines": [line.as_dict() for line in lines]}
        show_json({**told, "report": report})
    else:
        if any(state.status == "failed" for state in states):
            show_states(folder, states, again)
        _show_lines(lines)
        terminal.print(f"tables: everedit summarize {shlex.quote(str(folder.path))}", soft_wrap=True)
        if report:
            terminal.print(f"report: {report}", soft_wrap=True)
    if any(state.status == "failed" for state in states):
        raise typer.Exit(1)


def _list(*, json: bool) -> None:
    from everedit.experiments.recipes import recipe, recipe_names

    found = {name: recipe(name) for name in recipe_names()}
    if json:
        show_json({name: {"title": r.title, "paper": r.paper, "about": r.about} for name, r in found.items()})
        return
    rows = [(name, r.title, r.paper) for name, r in found.items()]
    show_table("Recipes", ("name", "table", "paper"), rows)


def _folders(checkpoints: list[str]) -> dict[str, Path]:
    from everedit.errors import EditError

    found = {}
    for text in checkpoints:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            what = f"'{text}' is not of the form NAME=FOLDER"
            raise EditError(what=what, where="--checkpoint", fix="for example --checkpoint mend=runs/mend")
        found[name] = Path(folder)
    return found


def _introduce(title: str, paper: str, about: str, notes: list[str]) -> None:
    terminal.print(f"[bold]{title}[/]", soft_wrap=True)
    for text in (paper, about, *(f"note: {note}" for note in notes)):
        terminal.print(text, soft_wrap=True, markup=False, highlight=False)


def _show_lines(lines: list[Line]) -> None:
    several = len({line.where for line in lines}) > 1
    rows: list[tuple[Any, ...]] = [
        ((line.where, line.says) if several else (line.says,)) + (line.expected, line.found, line.verdict)
        for line in lines
    ]
    columns = ("where", "claim") if several else ("claim",)
    show_table("Expected and found", (*columns, "expected", "found", "verdict"), rows, short=False)
    counts = Counter(line.verdict for line in lines)
    terminal.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), soft_wrap=True)
