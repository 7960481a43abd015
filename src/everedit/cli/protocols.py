"""``everedit protocols``: what a score can mean."""

from __future__ import annotations

import typer

from everedit.cli.console import friendly, show_json, show_table

app = typer.Typer(help="Protocols: named, versioned ways to score edits.", no_args_is_help=True)


@app.command("ls")
@friendly
def ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List every protocol with its figures and the data sets that are scored under it."""
    from everedit.data import data_names, data_set
    from everedit.evaluation import FOR_ANY_DATA, PROTOCOLS

    sets = {name: data_set(name).protocols for name in data_names()}
    found = {
        name: {
            "explanation": protocol.explanation,
            "figures": list(protocol.columns),
            "data": ["any"] if name in FOR_ANY_DATA else [data for data, names in sets.items() if name in names],
        }
        for name, protocol in PROTOCOLS.items()
    }
    if json:
        show_json(found)
        return
    for name, about in found.items():
        rows = [(key, about[key] if key == "explanation" else ", ".join(about[key])) for key in about]
        show_table(name, ("about", "it"), rows)
