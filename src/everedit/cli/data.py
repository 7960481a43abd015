"""``everedit data``: data sets, and a check of a file of edits."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, show_json, show_table, terminal

app = typer.Typer(help="Data sets, and checks of files of edits.", no_args_is_help=True)


@app.command("ls")
@friendly
def ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List the data sets that can be read."""
    from everedit.data import data_names

    names = data_names()
    if json:
        show_json(names)
    else:
        show_table("Data sets", ("name", "what it is"), names.items())


@app.command("validate")
@friendly
def validate(
    file: Path = typer.Argument(help="A JSON, JSONL or CSV file of edits."),
    data: str = typer.Option("plain", help="The data set whose form the file has (everedit data ls)."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """List every bad record with its line and what to do; exit code 1 if there is any."""
    from everedit.data import load_edits

    found = load_edits(data, file)
    if json:
        show_json({"edits": len(found.edits), "rejected": [item.as_dict() for item in found.rejected]})
    else:
        if found.rejected:
            rows = [(item.line, item.reason, item.fix) for item in found.rejected]
            show_table(f"{len(found.rejected)} bad records", ("line", "what is wrong", "what to do"), rows)
        terminal.print(f"{len(found.edits)} edits can be used, {len(found.rejected)} records cannot")
    if found.rejected:
        raise typer.Exit(1)
