"""``everedit methods`` and ``everedit policies``: what there is, and its traits."""

from __future__ import annotations

import typer

from everedit.cli.console import friendly, show_json, show_table

methods_app = typer.Typer(help="Editing methods and their traits.", no_args_is_help=True)
policies_app = typer.Typer(help="Policies: how the edits of a stream combine.", no_args_is_help=True)


@methods_app.command("ls")
@friendly
def methods_ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List every method with its traits and settings."""
    from everedit.methods import method_class, method_names

    found = {name: method_class(name) for name in method_names()}
    if json:
        show_json({n: {**m.traits.as_dict(), "settings": m.Config.model_json_schema()} for n, m in found.items()})
        return
    needs = {"needs_subject": "a subject", "needs_moments": "statistics", "needs_training": "training"}
    can = {"solves_batches": "batches", "keeps_state": "keeps state", "encoder_decoder": "encoder-decoders"}
    rows = [
        (name, m.traits.title, m.traits.changes, _named(m.traits, needs), _named(m.traits, can), m.traits.paper)
        for name, m in found.items()
    ]
    show_table("Methods", ("method", "title", "changes", "needs", "can", "paper"), rows)


def _named(traits: object, words: dict[str, str]) -> str:
    return ", ".join(word for trait, word in words.items() if getattr(traits, trait)) or "–"


@policies_app.command("ls")
@friendly
def policies_ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List every policy with its settings."""
    from everedit.policies import policy_class, policy_names

    found = {name: policy_class(name) for name in policy_names()}
    if json:
        show_json({n: {**p.traits(), "settings": p.Config.model_json_schema()} for n, p in found.items()})
        return
    rows = [(name, p.title, p.stage, ", ".join(p.Config.model_fields) or "–", p.paper) for name, p in found.items()]
    show_table("Policies", ("policy", "title", "stage", "settings", "paper"), rows)
