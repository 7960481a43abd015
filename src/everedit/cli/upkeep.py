"""``everedit conflicts``, ``expire``, ``retention``, ``export``: keeping a living model in order, and shipping it."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal
from everedit.cli.living import BY, DEVICE, FOLDER, JSON, SHORT, WAIT, opened


@friendly
def conflicts(folder: Path = FOLDER, json: bool = JSON) -> None:
    """List the edits that contradict each other, or that are written to one and the same place."""
    from everedit.conflicts import conflicts_among
    from everedit.ledger.store import Ledger
    from everedit.living import LivingConfig

    config = LivingConfig.load(folder).conflicts
    with Ledger.open(folder) as ledger:
        found = list(conflicts_among(ledger.held, config))
    if json:
        show_json([conflict.as_dict() for conflict in found])
        return
    rows = [
        (conflict.kind, conflict.edit.prompt, conflict.edit.target_new, conflict.held.edit.prompt,
         conflict.held.edit.target_new, conflict.similarity)
        for conflict in found
    ]  # fmt: skip
    show_table(f"{len(found)} conflicts", ("kind", "newer", "target", "older", "target", "cosine"), rows)


@friendly
def expire(
    folder: Path = FOLDER,
    today: str = typer.Option("", help="The day to look from, such as 2027-07-01; by default this one."),
    apply: bool = typer.Option(False, "--apply", help="Forget them."),
    by: str = BY,
    wait: float = WAIT,
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """List the edits that no longer hold, by the date given with --until; forget them with --apply."""
    from everedit.ledger.store import Ledger
    from everedit.living.times import day, now

    with Ledger.open(folder) as ledger:
        stale = ledger.held.expired(day(today) if today else now()[:10])
    forgotten = []
    if apply and stale:
        with opened(folder, device) as living, showing_progress() as reporter:
            reporter.stage("forgetting")
            forgotten = living.expire(today, by=by, wait=wait)
    if json:
        listed = [{"id": item.edit.id, "commit": item.commit, **item.record.as_dict()} for item in stale]
        show_json({"expired": listed, "forgotten": [commit.as_dict() for commit in forgotten]})
        return
    rows = [(item.commit[:SHORT], item.record.until, item.edit.prompt, item.edit.target_new) for item in stale]
    show_table(f"{len(stale)} edits past their date", ("commit", "until", "prompt", "target"), rows)
    if forgotten:
        terminal.print(f"forgotten by {forgotten[0].draft.info['how']}: commit {forgotten[0].id[:SHORT]}")
    elif stale and not apply:
        terminal.print("to forget them: --apply")


@friendly
def retention(
    folder: Path = FOLDER,
    blame: bool = typer.Option(True, help="Find the commit that broke each lost edit, by halving."),
    figure: Path | None = typer.Option(None, help="Where the survival curve goes. [retention.svg in the folder]"),
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """Score all edits on the present model, draw how long edits live, and name what broke those that were lost."""
    from everedit.report.survival_figure import write_survival_figure

    with opened(folder, device) as living, showing_progress() as reporter:
        reporter.stage("asking for every edit")
        found = living.retention(blame=blame)
    drawn = write_survival_figure(found.curve, figure or folder / "retention.svg") if found.curve else None
    if json:
        show_json({**found.as_dict(), "figure": str(drawn) if drawn else None})
        return
    lost = [fate for fate in found.fates if not fate.held]
    rows = [
        (fate.item.commit[:SHORT], fate.item.edit.prompt, fate.item.edit.target_new, fate.lived if blame else None,
         fate.broken_by[:SHORT] if blame else None)
        for fate in lost
    ]  # fmt: skip
    if rows:
        show_table("Lost", ("commit", "prompt", "target", "commits lived", "broken by"), rows)
    held = len(found.fates) - len(lost)
    terminal.print(f"{held} of {len(found.fates)} edits held" + (f"; survival curve: {drawn}" if drawn else ""))


@friendly
def export(
    folder: Path = FOLDER,
    format: str = typer.Option(..., help="merged, peft, gguf or card."),
    out: Path = typer.Option(..., help="The new folder to write."),
    setting: list[str] = typer.Option([], "--set", help="key=value of the format; may be repeated."),
    measure: bool = typer.Option(True, help="Score all facts before and after, for the card."),
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """Write the edited model for others: as a whole model, a LoRA adapter, a GGUF file, or a card of its facts."""
    from everedit.experiments.config import apply_settings

    options: dict[str, object] = {}
    apply_settings(options, setting)
    with opened(folder, device) as living, showing_progress() as reporter:
        reporter.stage(f"exporting as {format}")
        done = living.export(format, out, measure=measure, **options)
    if json:
        show_json({"format": done.format, "path": str(done.path), "files": done.files, "figures": dict(done.figures)})
        return
    show_table(str(done.path), ("file",), [(name,) for name in done.files])
    if done.figures:
        show_table("Figures", ("what", "value"), [(key, str(value)) for key, value in done.figures.items()])
