"""``everedit data``: data sets, what is in them, a check of a file of edits, and edits proposed from sentences."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everedit.cli.console import friendly, show_json, show_table, terminal

if TYPE_CHECKING:
    from everedit.data import Loaded
    from everedit.edit import Edit

app = typer.Typer(help="Data sets, and checks of files of edits.", no_args_is_help=True)


@app.command("ls")
@friendly
def ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List the data sets that can be read, with licence and protocols."""
    from everedit.data import data_names, data_set

    found = {name: data_set(name) for name in data_names()}
    if json:
        show_json({name: known.about() for name, known in found.items()})
        return
    rows = [(name, known.title, ", ".join(known.protocols) or "any", known.licence) for name, known in found.items()]
    show_table("Data sets", ("name", "what it is", "protocols", "licence"), rows)


@app.command("show")
@friendly
def show(
    name: str = typer.Argument(help="A data set (everedit data ls) or a file of edits."),
    path: str | None = typer.Option(None, help="Its file or folder; 'hub' for its copy on the Hugging Face hub."),
    limit: int = typer.Option(5, min=1, help="How many edits."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Show what a data set is and its first edits as they are read."""
    from everedit.data import data_set, load_edits

    loaded = load_edits(name, path, keep_contradictions=True)
    known = data_set(loaded.name)
    edits = loaded.edits[:limit]
    if json:
        shown = [edit.model_dump(mode="json", exclude_defaults=True) for edit in edits]
        show_json({"name": loaded.name, **known.about(), **_counts(loaded), "first": shown})
        return
    about = {key: value for key, value in known.about().items() if value not in ("", [])}
    about |= {"file": str(loaded.path), **_counts(loaded)}
    show_table(loaded.name, ("what", "value"), [(key.replace("_", " "), _line(value)) for key, value in about.items()])
    for line, edit in zip(loaded.lines, edits, strict=False):
        fields = edit.model_dump(mode="json", exclude_defaults=True) | {
            group: _kinds(probes) for group in ("locality", "portability") if (probes := getattr(edit, group))
        }
        rows = [(key.replace("_", " "), _short(_line(value))) for key, value in fields.items()]
        show_table(f"line {line}", ("field", "value"), rows)


def _counts(loaded: Loaded) -> dict[str, Any]:
    from everedit.data.contradictions import contradicted_by

    return {
        "edits": len(loaded.edits),
        "set_aside": len(loaded.rejected),
        "left_out": len(loaded.notices),
        "subjects": len({edit.subject for edit in loaded.edits if edit.subject is not None}),
        "contradicted_by_a_later_edit": sum(index is not None for index in contradicted_by(loaded.edits)),
    }


def _line(value: Any) -> str:
    return " | ".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _kinds(probes: Any) -> str:
    return ", ".join(f"{count} {kind or 'probe'}" for kind, count in Counter(p.kind for p in probes).items()) or "–"


@app.command("validate")
@friendly
def validate(
    file: str = typer.Argument(help="A file of edits, or the folder of a data set."),
    data: str = typer.Option("plain", help="The data set whose form the file has (everedit data ls)."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """List every bad record with its line and what to do; exit code 1 if there is any."""
    from everedit.data import load_edits

    found = load_edits(data, file)
    if json:
        notices = [{"line": item.line, "what": item.what} for item in found.notices]
        rejected = [item.as_dict() for item in found.rejected]
        show_json({**_counts(found), "rejected": rejected, "notices": notices})
    else:
        if found.rejected:
            rows = [(item.line, item.reason, item.fix) for item in found.rejected]
            show_table(f"{len(found.rejected)} bad records", ("line", "what is wrong", "what to do"), rows)
        if found.notices:
            left = [(item.line, item.what) for item in found.notices]
            show_table(f"{len(left)} things left out of records that can be used", ("line", "what"), left)
        terminal.print(f"{len(found.edits)} edits can be used, {len(found.rejected)} records cannot")
        later = _counts(found)["contradicted_by_a_later_edit"]
        if later:
            terminal.print(f"{later} of the edits are contradicted by a later one in other words: none can keep both")
    if found.rejected:
        raise typer.Exit(1)


@app.command("propose")
@friendly
def propose(
    sheet: Path = typer.Argument(help="Sentences: .txt, one a line, or CSV or JSONL with a column `sentence`."),
    out: Path = typer.Option(Path("proposed.jsonl"), help="Where the proposed records go, to be read and corrected."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Find subject and answer in plain sentences and propose a record for each; check them before they are used."""
    from json import dumps

    from everedit.cache import write_text
    from everedit.data.sentences import Proposal, proposals

    found = list(proposals(sheet))
    good = [item for item in found if isinstance(item, Proposal)]
    bad = [item for item in found if not isinstance(item, Proposal)]
    write_text(out, "".join(dumps(item.as_record(), ensure_ascii=False) + "\n" for item in good))
    if json:
        records = [{"line": item.line, "sentence": item.sentence, **item.as_record()} for item in good]
        failed = [{"where": item.where, "what": item.what, "fix": item.fix} for item in bad]
        show_json({"out": str(out), "proposed": records, "failed": failed})
    else:
        rows = [(item.line, *_parts(item.edit), "; ".join(item.doubts) or "–") for item in good]
        show_table("Proposed edits", ("line", "prompt", "subject", "target", "to be checked"), rows)
        if bad:
            show_table("Sentences without one", ("where", "why", "what to do"), [(e.where, e.what, e.fix) for e in bad])
        terminal.print(f"{len(good)} records in {out}, {len(bad)} sentences without one", soft_wrap=True)
    if bad:
        raise typer.Exit(1)


def _parts(edit: Edit) -> tuple[str, str | None, str]:
    return _short(edit.prompt), edit.subject, _short(edit.target_new)
