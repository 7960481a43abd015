"""``everedit edit``: one correction, made and shown; nothing is kept."""

from __future__ import annotations

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal


@friendly
def edit(
    prompt: str = typer.Option(..., help='The beginning of a sentence, such as "The capital of Kenya is".'),
    target: str = typer.Option(..., help="What the model should say instead."),
    subject: str | None = typer.Option(None, help="What the fact is about, as it stands in the prompt."),
    model: str = typer.Option("smollm2-135m", help="Alias, folder or Hugging Face id."),
    method: str = typer.Option("memit", help="See: everedit methods ls."),
    ask: list[str] = typer.Option([], help="Further prompts to show before and after; may be repeated."),
    setting: list[str] = typer.Option([], "--set", help="method.key=value or stats.key=value; may be repeated."),
    force: bool = typer.Option(False, help="Edit although the model says the target already."),
    device: str | None = typer.Option(None, help="Where to compute; the best at hand by default."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Make one edit and show what the model says before and after it."""
    from everedit.edit import Edit
    from everedit.errors import EditError
    from everedit.experiments import RunConfig
    from everedit.experiments.run import make_editor
    from everedit.models import load_model

    wanted = Edit.parse({"prompt": prompt, "target_new": target, "subject": subject})
    config = RunConfig.build(None, {"model": model, "method": method, "device": device}, setting)
    with showing_progress() as reporter:
        reporter.stage(f"loading {model}")
        editor = make_editor(load_model(model, device=device), config)
        if not force and editor.evaluator.baseline([wanted]).says_already(wanted):
            raise EditError(
                what="the target is already the model's answer", where=prompt, fix="use --force to edit anyway"
            )
        reporter.stage("statistics", config.stats.tokens)
        editor.bench.moments.progress = lambda done, _: reporter.step(done)
        editor.prepare()
        reporter.stage("editing")
        result = editor.edit(wanted)
        reporter.stage("asking")
        answers = [editor.ask(text) for text in (prompt, *ask)]
    scores = {
        name: {"before": result.before[0].scores[name], "after": result.after[0].scores[name]}
        for name in result.after[0].scores
    }
    if json:
        asked = [{"prompt": a.prompt, "base": a.base, "edited": a.edited} for a in answers]
        show_json({"edit": wanted.id, "norm": result.norm, "scores": scores, "answers": asked})
        return
    show_table(
        "Before and after",
        ("prompt", "base", "edited"),
        [(a.prompt, a.base.strip(), a.edited.strip()) for a in answers],
    )
    rows = [(name, both["before"]["reliability"], both["after"]["reliability"]) for name, both in scores.items()]
    show_table("Does it say the target?", ("protocol", "before", "after"), rows)
    terminal.print(f"norm of the change: {result.norm:.3f}; nothing was saved")
