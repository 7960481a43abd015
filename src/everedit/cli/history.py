"""``everedit log``, ``show``, ``diff``, ``undo``, ``forget``, ``checkout``, ``verify``: what was done, and undone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal
from everedit.cli.living import BY, DEVICE, FOLDER, JSON, SHORT, WAIT, opened

if TYPE_CHECKING:
    from everedit.ledger.records import CommitRecord

_COMMIT = typer.Argument(help="The beginning of a commit's or an edit's id.")


@friendly
def log(
    folder: Path = FOLDER,
    limit: int = typer.Option(20, "--limit", "-n", help="How many of the newest commits; 0: all."),
    everything: bool = typer.Option(False, "--all", help="Also what was undone, refused or set aside."),
    json: bool = JSON,
) -> None:
    """List the edits, the newest first: who made them, when, from what source, until when they hold."""
    from everedit.ledger.store import Ledger

    with Ledger.open(folder) as ledger:
        commits = list(ledger.log(limit or None, everything=everything))
        events = ledger.events(limit or None) if everything else []
        held = ledger.held_count()
    if json:
        shown: Any = [commit.as_dict() for commit in commits]
        show_json({"commits": shown, "events": [event.as_dict() for event in events]} if everything else shown)
        return
    rows = [row for commit in commits for row in _rows(commit, everything)]
    columns = ("commit", "#", "when", "by", "what", "source", "until")
    show_table(f"{folder}: {held} edits held", columns, rows)
    if events:
        show_table(
            "Beside the commits",
            ("what", "when", "by", "about"),
            [(event.action, event.at, event.by, _about(event.info)) for event in events],
        )


def _rows(commit: CommitRecord, everything: bool) -> list[tuple[Any, ...]]:
    gone = "" if commit.active or not everything else " (undone)"
    about, start = commit.draft.info, (commit.id[:SHORT], commit.number)
    if not commit.edits:
        how = f", by {about['how']}" if "how" in about else ""
        what = (
            f"{about.get('why', commit.draft.kind)}{how}: {', '.join(about.get('forgot', ())) or about.get('source')}"
        )
        return [(*start, commit.draft.at, about.get("by", ""), what + gone, "", "")]
    return [
        (*start, item.record.at, item.record.by, f"{item.edit.prompt} -> {item.edit.target_new}{gone}",
         item.record.source, item.record.until)
        for item in commit.edits
    ]  # fmt: skip


def _about(info: dict[str, Any]) -> str:
    if "reason" in info:
        return str(info["reason"])
    return f"{(info.get('from') or 'base')[:SHORT]} -> {(info.get('to') or 'base')[:SHORT]}"


@friendly
def show(folder: Path = FOLDER, commit: str = _COMMIT, json: bool = JSON) -> None:
    """Show all that is known of a commit: its edits, figures, and the hashes of the tensors that it changed."""
    from everedit.ledger.store import Ledger

    with Ledger.open(folder) as ledger:
        found = ledger.commit(ledger.resolve(commit)).as_dict()
    if json:
        show_json(found)
        return
    edits = found.pop("edits")
    show_table("Commit", ("what", "value"), [(key, str(value)) for key, value in found.items()])
    for edit in edits:
        flat = {"id": edit["id"], **edit["edit"], **{key: edit[key] for key in ("by", "at", "source", "until")}}
        show_table("Edit", ("what", "value"), [(key, str(value)) for key, value in flat.items() if value])


@friendly
def diff(
    folder: Path = FOLDER,
    one: str = typer.Argument(help="A commit, or base, or head."),
    other: str = typer.Argument("head", help="Another."),
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """Show what differs between two commits: edits held by only one, and how far the weights are apart."""
    with opened(folder, device) as living:
        found = living.diff(one, other).as_dict()
    if json:
        show_json(found)
        return
    for sign, name in (("-", "removed"), ("+", "added")):
        for edit in found[name]:
            terminal.print(f"{sign} {edit['edit']['prompt']} -> {edit['edit']['target_new']}", markup=False)
    rows = [(name, size["norm"], size["relative"]) for name, size in found["weights"].items()]
    show_table("Weights", ("weight", "norm of the difference", "share of the base"), rows)
    if found["state"]:
        terminal.print(f"state that differs: {', '.join(found['state'])}", soft_wrap=True)


@friendly
def undo(
    folder: Path = FOLDER,
    steps: int = typer.Argument(1, min=1, help="How many commits."),
    by: str = BY,
    wait: float = WAIT,
    device: str | None = DEVICE,
) -> None:
    """Take back the last commits, bit for bit; they stay in the ledger, and checkout leads back to them."""
    with opened(folder, device) as living:
        came_from = living.head
        head = living.undo(steps, by=by, wait=wait)
    back = f"; to go back: everedit checkout {folder} {came_from[:SHORT]}"
    terminal.print(f"now at {head[:SHORT] or 'the base model'}{back}", soft_wrap=True)


@friendly
def forget(
    folder: Path = FOLDER,
    commit: str = _COMMIT,
    how: str = typer.Option("auto", help="downdate: by algebra; replay: make what came later again; auto."),
    by: str = BY,
    wait: float = WAIT,
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """Take out an edit in the middle, as if it had never been made."""
    from everedit.errors import EditError

    if how not in ("auto", "downdate", "replay"):
        raise EditError(what=f"'{how}' is no way to forget", where="--how", fix="choose downdate, replay or auto")
    with opened(folder, device) as living, showing_progress() as reporter:
        reporter.stage("forgetting")
        done = living.forget(commit, how=how, by=by, wait=wait)  # type: ignore[arg-type]
    if json:
        show_json(done.as_dict())
        return
    info = done.draft.info
    again = f", {info['remade']} later edits made again" if info["how"] == "replay" else ""
    terminal.print(f"forgotten by {info['how']}{again}: {', '.join(info['forgot'])} (commit {done.id[:SHORT]})")


@friendly
def checkout(
    folder: Path = FOLDER,
    commit: str = typer.Argument(help="The beginning of a commit's id, or base."),
    by: str = BY,
    wait: float = WAIT,
    device: str | None = DEVICE,
) -> None:
    """Go to any commit that was ever made."""
    with opened(folder, device) as living:
        head = living.checkout(commit, by=by, wait=wait)
    terminal.print(f"now at {head[:SHORT] or 'the base model'}")


@friendly
def verify(folder: Path = FOLDER, device: str | None = DEVICE) -> None:
    """Make every state again from the base model and compare all hashes, bit for bit."""
    with opened(folder, device) as living, showing_progress() as reporter:
        reporter.stage("replaying", living.number)
        count = living.verify(reporter.step)
    terminal.print(f"{count} commits, every bit as it was committed")
