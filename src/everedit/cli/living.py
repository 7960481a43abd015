"""``everedit init``, ``add``, ``ask`` and ``open``: living models made, corrected and questioned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal

if TYPE_CHECKING:
    from everedit.edit import Edit
    from everedit.living import Added, LivingModel, SetAside

FOLDER = typer.Argument(help="The folder of the living model.", metavar="LIVING_MODEL")
DEVICE = typer.Option(None, help="Where to compute; the best at hand by default.")
WAIT = typer.Option(0.0, help="Seconds to wait for another process that is writing to it.")
BY = typer.Option("", help="Who does it; by default the user of this machine.")
JSON = typer.Option(False, "--json", help="Write JSON to standard output.")
SHORT = 12


def opened(folder: Path, device: str | None) -> LivingModel:
    """Open a living model, showing that it takes a while."""
    from everedit.living import LivingModel

    with showing_progress() as reporter:
        reporter.stage(f"opening {folder}")
        return LivingModel.open(folder, device=device)


@friendly
def init(
    folder: Path = FOLDER,
    model: str = typer.Option("smollm2-135m", help="Alias, folder or Hugging Face id of the base model."),
    method: str = typer.Option("memit", help="See: everedit methods ls."),
    policy: str = typer.Option("accumulate", help="See: everedit policies ls."),
    dtype: str | None = typer.Option(None, help="Number format of the weights; the model's own by default."),
    seed: int = typer.Option(0, help="Seed of everything that is sampled."),
    setting: list[str] = typer.Option(
        [], "--set", help="method.key=value, policy.key=value, stats.key=value, gates.key=value, conflicts.key=value."
    ),
    device: str | None = DEVICE,
) -> None:
    """Make a living model: a folder with a base model, a method, a policy, and a ledger of every edit to come."""
    from everedit.experiments.config import apply_settings
    from everedit.living import LivingModel

    values: dict[str, Any] = {"dtype": dtype, "seed": seed}
    apply_settings(values, setting)
    with showing_progress() as reporter:
        reporter.stage(f"loading {model}")
        with LivingModel.create(folder, model, method, policy, device=device, **values) as living:
            config = living.config
    terminal.print(
        f"{folder}: {config.model}, {config.method}, {config.policy}; settings in {folder / 'config.yaml'}",
        soft_wrap=True,
    )


@friendly
def add(
    folder: Path = FOLDER,
    prompt: str | None = typer.Option(None, help='The beginning of a sentence, such as "The capital of Kenya is".'),
    target: str | None = typer.Option(None, help="What the model should say instead."),
    subject: str | None = typer.Option(None, help="What the fact is about, as it stands in the prompt."),
    relation: str | None = typer.Option(None, help="What kind of fact it is; two of one kind and subject conflict."),
    file: Path | None = typer.Option(None, help="A JSON, JSONL or CSV file of edits instead."),
    by: str = BY,
    source: str = typer.Option("", help="Where the fact comes from, such as an address."),
    until: str = typer.Option("", help="The last day on which it holds, such as 2027-06-30."),
    batch: int = typer.Option(1, help="How many edits are made together, by methods that solve batches."),
    on_conflict: str = typer.Option("error", help="error: set the edit aside; replace: forget the older one; keep."),
    on_refusal: str = typer.Option("skip", help="skip: leave the edit out; stop; retry: with smaller steps."),
    again: bool = typer.Option(False, "--again", help="Make edits too that the model holds or says already."),
    resume: bool = typer.Option(False, "--resume", help="Leave out what was set aside before."),
    wait: float = WAIT,
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """Add one correction, or a file of them; each is on disk before it is said to be made."""
    from everedit.errors import EditError

    options = {"by": by, "source": source, "until": until, "batch": batch, "on_conflict": on_conflict,
               "on_refusal": on_refusal, "again": again, "resume": resume, "wait": wait}  # fmt: skip
    if (file is None) == (prompt is None):
        raise EditError(what="give either a prompt and a target, or a file", fix="see everedit add --help")
    lines: dict[str, int] = {}
    bad: list[SetAside] = []
    edits = _from_file(file, on_conflict, lines, bad) if file else [_single(prompt, target, subject, relation)]
    with opened(folder, device) as living, showing_progress() as reporter:
        reporter.stage("editing", len(edits))
        done = living.add(edits, progress=reporter.step, **options)
    done.set_aside = [replace(item, line=lines.get(item.edit.id) if item.edit else None) for item in done.set_aside]
    done.set_aside += bad
    if json:
        show_json(done.as_dict())
    else:
        _show(done)
    if not done.commits and not any(item.why == "held already" for item in done.set_aside):
        raise typer.Exit(1)


def _single(prompt: str | None, target: str | None, subject: str | None, relation: str | None) -> Edit:
    from everedit.edit import Edit
    from everedit.errors import EditError

    if target is None:
        raise EditError(what="there is no target", fix='say what the model should answer: --target "30 days"')
    return Edit.parse({"prompt": prompt, "target_new": target, "subject": subject, "relation": relation})


def _from_file(file: Path, on_conflict: str, lines: dict[str, int], bad: list[SetAside]) -> list[Edit]:
    """Return the edits of a file; put down where each stands, and the records that are none."""
    from everedit.data import load_edits
    from everedit.living.outcome import SetAside

    loaded = load_edits(str(file), keep_contradictions=on_conflict != "error")
    lines.update({edit.id: line for edit, line in zip(loaded.edits, loaded.lines, strict=True)})
    bad += [SetAside("bad record", item.reason, item.fix, None, {}, item.line, item.record) for item in loaded.rejected]
    return loaded.edits


def _show(done: Added) -> None:
    if done.commits:
        rows = [
            (commit.id[:SHORT], item.edit.prompt, item.edit.target_new, commit.draft.norm)
            for commit in done.commits
            for item in commit.edits
        ]
        show_table("Committed", ("commit", "prompt", "target", "norm"), rows)
    for conflict in done.conflicts:
        terminal.print(f"[bold]conflict:[/] '{conflict.edit.prompt}': {conflict}", soft_wrap=True)
    if done.set_aside:
        left = [
            (item.why, item.line, item.edit.prompt if item.edit else str(item.record), item.reason, item.fix)
            for item in done.set_aside
        ]
        show_table("Set aside", ("why", "line", "record", "reason", "what to do"), left)
    stopped = "; stopped at a refusal" if done.stopped else ""
    terminal.print(f"{len(done.commits)} committed, {len(done.set_aside)} set aside{stopped}")


@friendly
def ask(
    folder: Path = FOLDER,
    prompts: list[str] = typer.Argument(help="What to ask."),
    tokens: int = typer.Option(32, help="Most tokens of an answer."),
    device: str | None = DEVICE,
    json: bool = JSON,
) -> None:
    """Show the base model's and the edited model's answers side by side."""
    with opened(folder, device) as living:
        answers = [living.ask(prompt, max_new_tokens=tokens) for prompt in prompts]
    if json:
        show_json([{"prompt": answer.prompt, "base": answer.base, "edited": answer.edited} for answer in answers])
        return
    rows = [(answer.prompt, answer.base.strip(), answer.edited.strip()) for answer in answers]
    show_table("", ("prompt", "base", "edited"), rows, short=False)


@friendly
def open_(
    edited: Path = typer.Argument(help="A peer's full model folder, as save_pretrained writes it."),
    into: Path = typer.Option(..., help="The living model to make of it."),
    base: str = typer.Option(..., help="Alias, folder or id of the model that it was edited from."),
    method: str = typer.Option("memit", help="How further edits are made."),
    policy: str = typer.Option("accumulate", help="How they combine."),
    source: str = typer.Option("", help="Where the model comes from."),
    by: str = BY,
    device: str | None = DEVICE,
) -> None:
    """Import a model that somebody else edited: its difference from the base becomes the first commit."""
    from everedit.living import LivingModel

    with showing_progress() as reporter:
        reporter.stage(f"loading {base}")
        with LivingModel.create(into, base, method, policy, device=device) as living:
            reporter.stage(f"comparing with {edited}")
            commit = living.adopt(edited, source=source, by=by)
    weights = commit.draft.info["imported"]["weights"]
    rows = [(name, found["rank"], found["relative_error"]) for name, found in weights.items()]
    show_table("Imported", ("weight", "rank", "relative error"), rows)
    terminal.print(f"{into}: commit {commit.id[:SHORT]}", soft_wrap=True)
