"""The entry point: ``everedit COMMAND``."""

from __future__ import annotations

import os

import typer

from everedit._version import __version__
from everedit.cli import (
    ability,
    compare,
    data,
    demo,
    edit,
    history,
    legacy,
    living,
    methods,
    models,
    plot,
    protocols,
    report,
    reproduce,
    rollback,
    run,
    stats,
    summarize,
    sweep,
    trace,
    train,
    upkeep,
)
from everedit.cli.console import terminal

__all__ = ["app", "main"]

app = typer.Typer(
    help="Lifelong model editing: correct facts in an open-weights language model, one after another.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: everedit demo",
)


def _version(value: bool) -> None:
    if value:
        terminal.print(f"everedit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Take the options that stand before a command."""


app.command("demo")(demo.demo)
app.command("edit")(edit.edit)
app.command("run")(run.run)
app.command("sweep", cls=sweep.BareRay)(sweep.sweep)
app.command("reproduce", cls=sweep.BareRay)(reproduce.reproduce)
app.command("summarize")(summarize.summarize)
app.command("plot")(plot.plot)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("rollback")(rollback.rollback)
app.command("trace")(trace.trace)
app.command("train")(train.train)
_LIVING = "Living models"
app.command("init", rich_help_panel=_LIVING)(living.init)
app.command("add", rich_help_panel=_LIVING)(living.add)
app.command("ask", rich_help_panel=_LIVING)(living.ask)
app.command("open", rich_help_panel=_LIVING)(living.open_)
app.command("log", rich_help_panel=_LIVING)(history.log)
app.command("show", rich_help_panel=_LIVING)(history.show)
app.command("diff", rich_help_panel=_LIVING)(history.diff)
app.command("undo", rich_help_panel=_LIVING)(history.undo)
app.command("forget", rich_help_panel=_LIVING)(history.forget)
app.command("checkout", rich_help_panel=_LIVING)(history.checkout)
app.command("verify", rich_help_panel=_LIVING)(history.verify)
app.command("conflicts", rich_help_panel=_LIVING)(upkeep.conflicts)
app.command("expire", rich_help_panel=_LIVING)(upkeep.expire)
app.command("retention", rich_help_panel=_LIVING)(upkeep.retention)
app.command("export", rich_help_panel=_LIVING)(upkeep.export)
app.add_typer(models.app, name="models")
app.add_typer(methods.methods_app, name="methods")
app.add_typer(methods.policies_app, name="policies")
app.add_typer(data.app, name="data")
app.add_typer(protocols.app, name="protocols")
app.add_typer(ability.app, name="ability")
app.add_typer(stats.app, name="stats")
app.add_typer(legacy.app, name="legacy")


# A stream meets texts of ever new lengths. oneDNN and its wrapper in torch keep a thousand kernels each, one for every
# shape, and read these variables once: with fewer a process does not grow for hours, and is no slower.
_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def main() -> None:
    """Run the command line."""
    for name, count in _KERNELS_KEPT.items():
        os.environ.setdefault(name, count)
    app()
