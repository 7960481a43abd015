"""``everedit sweep``: a grid of runs from one file, side by side."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from everedit.cli.console import LiveTable, friendly, show_json, show_table, showing_live, showing_progress, terminal

if TYPE_CHECKING:
    from everedit.experiments.sweeps import Cell, CellState, SweepConfig, SweepFolder, Workers

_RAY_HERE = "local"


class BareRay(TyperCommand):
    """A command whose ``--ray`` may stand without a value: then for a Ray of our own on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare ``--ray`` its value."""
        for place, word in enumerate(args):
            if word == "--ray" and (place + 1 == len(args) or args[place + 1].startswith("-")):
                args = [*args[:place], f"--ray={_RAY_HERE}", *args[place + 1 :]]
        return super().parse_args(ctx, args)


@friendly
def sweep(
    file: Path | None = typer.Argument(None, help="A YAML file: axes, settings, rules. Not needed to --resume."),
    out: Path | None = typer.Option(None, help="The sweep's folder. [runs/NAME of the file]"),
    setting: list[str] = typer.Option([], "--set", help="key=value for all cells; wins over the file."),
    jobs: int = typer.Option(1, min=1, help="How many cells are made at a time."),
    threads: int | None = typer.Option(None, min=1, help="Threads a cell computes with. [all cores / jobs]"),
    gpus: str | None = typer.Option(None, help="GPUs to use, one cell on each: 0,1. With --ray, GPUs a cell."),
    ray: str | None = typer.Option(
        None, metavar="[ADDRESS]", help="On a Ray cluster: HOST:PORT, auto or, without a value, a Ray on this machine."
    ),
    plan: bool = typer.Option(False, "--plan", help="Show the cells and what they would cost, and stop."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the sweep in --out; with FILE, as that says now."),
    json: bool = typer.Option(False, "--json", help="Write how each cell ended as JSON to standard output."),
) -> None:
    """Run every combination of models, data sets, methods, policies and seeds, each into a run folder of its own."""
    from everedit.errors import EditError
    from everedit.experiments.sweeps import SweepConfig, SweepFolder, cells_of

    if file is None and (plan or not resume):
        raise EditError(what="which sweep?", where="everedit sweep", fix="give a YAML file, or --resume with --out")
    place = out or Path("runs") / (file.stem if file else "latest")
    if file is None:
        known = SweepFolder.open(place)
        begin, threads = (lambda: known), known.manifest.threads
    else:
        config = SweepConfig.read(file)
        cells = cells_of(config, str(file), setting)
        if plan:
            show_plan(cells, config.kind, jobs, json=json)
            return
        if not config.title:
            config = config.model_copy(update={"title": file.stem})
        source = file.read_text(encoding="utf-8")
        begin, threads = begin_sweep(place, config, cells, source, threads, jobs, resume=resume)
    again = f"everedit sweep --resume --out {shlex.quote(str(place))}"
    folder, states = execute(begin, threads, jobs, gpus=gpus, ray=ray, again=again)
    report = report_of(folder.path)
    if json:
        show_json({"out": str(folder.path), "cells": [state.as_dict() for state in states], "report": report})
    else:
        show_states(folder, states, again)
        terminal.print(f"tables: everedit summarize {shlex.quote(str(folder.path))}", soft_wrap=True)
        terminal.print(
            f"report: {report}" if report else "for a report: pip install 'everedit\\[report]'", soft_wrap=True
        )
    if any(state.status == "failed" for state in states):
        raise typer.Exit(1)


def begin_sweep(
    place: Path,
    config: SweepConfig,
    cells: list[Cell],
    source: str,
    threads: int | None,
    jobs: int,
    *,
    resume: bool,
) -> tuple[Callable[[], SweepFolder], int]:
    """Return how a sweep's folder is made, or gone on with to ``resume``, and the threads of a cell."""
    from everedit.experiments.sweeps import Manifest, SweepFolder

    if resume and (place / "sweep.json").exists():
        begun = SweepFolder.open(place)
        return (lambda: begun.extended(cells, source)), begun.manifest.threads
    manifest = Manifest(
        title=config.title,
        kind=config.kind,
        cells=tuple(cells),
        threads=threads or threads_for(jobs),
        untouched=config.untouched,
        cwd=str(Path.cwd()),
        source=source,
        command=shlex.join(["everedit", *sys.argv[1:]]),
    )
    return (lambda: SweepFolder.create(place, manifest)), manifest.threads


def threads_for(jobs: int) -> int:
    """Return how many threads each of so many cells at a time gets, unless the environment says."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, (os.cpu_count() or 1) // jobs)


def execute(
    begin: Callable[[], SweepFolder],
    threads: int,
    jobs: int,
    *,
    again: str,
    gpus: str | None = None,
    ray: str | None = None,
) -> tuple[SweepFolder, list[CellState]]:
    """Make the cells of the sweep that ``begin`` gives, and return it and how they ended.

    The workers are there before anything is written. Interrupted, it says ``again``, the command to go on with.
    """
    from everedit.experiments.sweeps import drive

    with closing(_workers(threads, jobs, gpus, ray)) as workers:
        folder = begin()
        try:
            with showing_live() as live:
                return folder, drive(folder, workers, _Watch(live))
        except KeyboardInterrupt:
            how = f"finished edits of every cell are kept; go on with: [bold]{again}[/]"
            terminal.print(how, soft_wrap=True)
            raise


def _workers(threads: int, jobs: int, gpus: str | None, ray: str | None) -> Workers:
    from everedit.errors import EditError
    from everedit.experiments.sweeps import LocalWorkers

    if ray is None:
        return LocalWorkers(jobs, [name.strip() for name in gpus.split(",")] if gpus else ())
    from everedit.experiments.sweeps.cluster import RayWorkers

    try:
        share = float(gpus or 0)
    except ValueError as error:
        raise EditError(
            what=f"'{gpus}' is no number of GPUs", where="--gpus", fix="with --ray, give how many a cell needs"
        ) from error
    return RayWorkers(ray, jobs, threads, share)


class _Watch:
    """Shows the cells at work as a live table, and says a line about each that ends."""

    def __init__(self, live: LiveTable) -> None:
        self._live = live
        self._told: set[str] = set()

    def __call__(self, states: Sequence[CellState]) -> None:
        for state in states:
            if state.status in ("done", "failed") and state.seconds is not None and state.cell.name not in self._told:
                self._told.add(state.cell.name)
                why = f": {state.note}" if state.note else ""
                self._live.say(f"{state.status} after {state.seconds:.0f} s: {state.cell.name}{why}")
        counts = {name: sum(state.status == name for state in states) for name in ("done", "failed", "waiting")}
        title = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        rows = [
            (
                state.cell.name,
                state.stage,
                state.done if state.total is None else f"{state.done}/{state.total}",
                state.note,
                f"{state.seconds:.0f} s",
            )
            for state in states
            if state.status == "running" and state.seconds is not None
        ]
        self._live.show(title, ("cell", "now", "done", "so far", "for"), rows)


def show_states(folder: SweepFolder, states: Sequence[CellState], again: str) -> None:
    """Show how each cell of a sweep ended."""
    axes = _varied([state.cell for state in states])
    rows = [(*(state.cell.axes[axis] for axis in axes), state.status, state.note) for state in states]
    show_table(folder.manifest.title, (*axes, "cell", "note"), rows)
    ended = {name: sum(state.status == name for state in states) for name in ("done", "failed", "skipped")}
    said = ", ".join(f"{count} {name}" for name, count in ended.items() if count)
    terminal.print(f"{said}; sweep folder {folder.path}", soft_wrap=True)
    if ended["failed"]:
        terminal.print(f"failed cells say why in error.json; to try them again: [bold]{again}[/]", soft_wrap=True)
    if strays := folder.strays():
        terminal.print(f"no longer part of the sweep, and left alone: {', '.join(strays)}", soft_wrap=True)


def _varied(cells: Sequence[Cell]) -> list[str]:
    """Return the axes on which cells differ; the method, if on none."""
    axes = list(cells[0].axes)
    return [axis for axis in axes if len({cell.axes[axis] for cell in cells}) > 1] or ["method"]


def report_of(folder: Path) -> str | None:
    """Write the page of a sweep and return its path; None without the ``report`` extra."""
    from everedit.report import can_report, write_sweep_report

    return str(write_sweep_report(folder).resolve()) if can_report() else None


def show_plan(cells: Sequence[Cell], kind: str, jobs: int, *, json: bool = False) -> None:
    """Show what a sweep would do."""
    from everedit.experiments.sweeps.plan import plan_sweep

    with showing_progress() as reporter:
        found = plan_sweep(cells, kind, reporter)
    axes = _varied(cells)
    rows = [
        {
            **{axis: cell.axes[axis] for axis in axes},
            "edits": plan.edits if plan else None,
            "seconds": plan.seconds_total if plan else None,
            "memory_mb": plan.memory_mb if plan else None,
            "note": note,
        }
        for cell, plan, note in found.cells
    ]
    if json:
        show_json({"cells": rows, "seconds": found.seconds, "memory_mb": found.memory_mb})
        return
    show_table("Plan (times and memory are estimates)", rows[0].keys(), [row.values() for row in rows])
    terminal.print(
        f"{len(rows)} cells, about {found.seconds / jobs / 60:.0f} minutes with {jobs} at a time, "
        f"{found.memory_mb * jobs:.0f} MiB",
        soft_wrap=True,
    )
