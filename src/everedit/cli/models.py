"""``everedit models``: what can be loaded, and how a model is laid out."""

from __future__ import annotations

import typer

from everedit.cli.console import friendly, show_json, show_table, terminal

app = typer.Typer(help="Models: what can be loaded, and how a model is laid out.", no_args_is_help=True)


@app.command("ls")
@friendly
def ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List the packaged models and the model types that have a family file."""
    from everedit.models.families import families
    from everedit.models.packaged import ALIASES

    packaged = [
        {"alias": m.alias, "title": m.title, "licence": m.licence, "installed": m.is_installed, "install": m.install}
        for m in ALIASES.values()
    ]
    known = {family.name: list(family.model_types) for family in families()}
    if json:
        show_json({"packaged": packaged, "families": known})
        return
    show_table(
        "Packaged models (any local folder or Hugging Face id works the same way)",
        ("alias", "model", "licence", "installed", "install with"),
        [(m["alias"], m["title"], m["licence"], "yes" if m["installed"] else "no", m["install"]) for m in packaged],
    )
    rows = [(name, ", ".join(types)) for name, types in known.items()]
    show_table("Families, by config.model_type", ("family", "model types"), rows)
    terminal.print("Other decoder-only models are looked at by their structure: everedit models inspect NAME")


@app.command("inspect")
@friendly
def inspect(
    name: str = typer.Argument(help="Alias, local folder or Hugging Face id."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Load a model and show its layout: where editing reads and writes."""
    from everedit.models import load_model

    lm = load_model(name)
    facts = {
        "name": name,
        **lm.layout.describe(),
        "parameters": lm.parameters,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "context_tokens": lm.context_tokens,
        "tokenizer": type(lm.tokenizer).__name__,
        "fingerprint": lm.fingerprint,
    }
    if json:
        show_json(facts)
    else:
        show_table(name, ("part", "found"), [(key.replace("_", " "), str(value)) for key, value in facts.items()])
