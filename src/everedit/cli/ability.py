"""``everedit ability``: what a model can do besides the facts that are edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal

app = typer.Typer(help="General ability: tasks, and a model's figures on them.", no_args_is_help=True)


@app.command("ls")
@friendly
def ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List the tasks on local files; every task of lm-eval can be measured, too."""
    from everedit.evaluation.ability import TASKS

    if json:
        about = {
            name: {"title": t.title, "file": t.file, "figures": list(t.figures), "published": t.published}
            for name, t in TASKS.items()
        }
        show_json(about)
        return
    rows = [(name, t.title, t.file, ", ".join(t.figures), "published" if t.published else "clean")
            for name, t in TASKS.items()]  # fmt: skip
    show_table("Tasks", ("name", "what it is", "file", "figures", "form"), rows)


@app.command("run")
@friendly
def run(
    model: str = typer.Option("smollm2-135m", help="Alias, folder or Hugging Face id."),
    task: str = typer.Option("", help="Tasks on local files, with commas (everedit ability ls)."),
    path: Path | None = typer.Option(None, help="The folder with their files."),
    lm_eval: str = typer.Option("", help="Tasks of the lm-eval harness, with commas."),
    include_path: Path | None = typer.Option(None, help="A folder with lm-eval tasks of your own."),
    text: Path | None = typer.Option(None, help="A text of your own, for its perplexity."),
    limit: int = typer.Option(100, min=1, help="Records of each task."),
    seed: int = typer.Option(0, help="Seed of the intervals."),
    out: Path | None = typer.Option(None, help="A JSONL file for every prompt and what the model said."),
    device: str | None = typer.Option(None, help="Where to compute; the best at hand by default."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Measure a model on tasks, each figure with its 95 % bootstrap interval."""
    from everedit.errors import EditError
    from everedit.evaluation.ability import Ability, AbilityConfig
    from everedit.models import load_model

    names = {"tasks": _names(task), "lm_eval": _names(lm_eval)}
    config = AbilityConfig(**names, path=path, limit=limit, text=text, include_path=include_path)
    if not (config.tasks or config.lm_eval or config.text):
        raise EditError(what="there is nothing to measure", fix="name tasks (--task nli,perplexity) or a --text")
    ability = Ability(config, seed)
    found = []
    with showing_progress() as reporter:
        reporter.stage(f"loading {model}")
        lm = load_model(model, device=device)
        reporter.stage("measuring", len(ability.names))
        for done, measured in enumerate(ability.measure(lm), start=1):
            found.append(measured)
            reporter.step(min(done, len(ability.names)), measured.task)
    if out is not None:
        _save(out, found)
    if json:
        show_json({"model": model, "tasks": {item.task: item.as_dict() for item in found}})
        return
    rows = [
        (item.task, name, value, _span(item.intervals.get(name)), item.examples, item.left_out)
        for item in found
        for name, value in item.figures.items()
    ]
    show_table(f"General ability of {model}", ("task", "figure", "value", "95 %", "examples", "too long"), rows)
    if out is not None:
        terminal.print(f"every prompt and answer: {out}", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _span(pair: tuple[float, float] | None) -> str:
    return "–" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"


def _save(out: Path, found: list[Any]) -> None:
    from json import dumps

    from everedit.cache import write_text

    rows = (
        {"task": item.task, "asked": outcome.asked, "said": outcome.said, "values": outcome.values}
        for item in found
        for outcome in item.outcomes
    )
    write_text(out, "".join(dumps(row, ensure_ascii=False) + "\n" for row in rows))
