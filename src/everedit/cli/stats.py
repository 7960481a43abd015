"""``everedit stats``: second moments of keys, computed, listed, and taken over from other code."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal

app = typer.Typer(help="Second moments of a model's keys over ordinary text.", no_args_is_help=True)


@app.command("ls")
@friendly
def ls(json: bool = typer.Option(False, "--json", help="Write JSON.")) -> None:
    """List the cached second moments with their provenance."""
    from safetensors import safe_open

    from everedit.cache import cache_root
    from everedit.engine.moments import describe_cached

    found = describe_cached(cache_root() / "moments", safe_open)
    if json:
        show_json(found)
        return
    columns = ("folder", "model", "layers", "tokens", "text")
    show_table(f"Second moments in {cache_root() / 'moments'}", columns, [[row[c] for c in columns] for row in found])


@app.command("compute")
@friendly
def compute(
    model: str = typer.Option("smollm2-135m", help="Alias, folder or Hugging Face id."),
    layers: str = typer.Option(..., help='Layers, such as "14-16" or "5,8,11".'),
    corpus: Path | None = typer.Option(None, help="Text or JSONL; without it, text sampled from the model."),
    tokens: int = typer.Option(8_192, help="How many tokens to read."),
    window_tokens: int = typer.Option(512, help="Length of a window, in tokens."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Compute the second moments of some layers in one pass over the text, or find them in the cache."""
    from everedit.engine.moments import Corpus, MomentStore
    from everedit.engine.spread import check_layers
    from everedit.models import load_model

    wanted = _layers(layers)
    lm = load_model(model)
    wanted = check_layers(wanted, lm.layout.n_layers)
    store = MomentStore(lm, Corpus(corpus, tokens, window_tokens))
    missing = store.missing(wanted)
    with showing_progress() as reporter:
        reporter.stage(f"second moments of {len(missing)} layers", tokens)
        store.progress = lambda done, _: reporter.step(done)
        found = store.get(wanted)
    facts = {"folder": str(store.folder), "computed": missing, "tokens": {m.layer: m.tokens for m in found.values()}}
    if json:
        show_json(facts)
    else:
        terminal.print(f"computed {len(missing)} of {len(wanted)} layers; in {store.folder}")


@app.command("import")
@friendly
def import_(
    files: list[Path] = typer.Argument(help="npz files of ROME's, MEMIT's or EasyEdit's layer_stats, one a layer."),
    model: str = typer.Option("smollm2-135m", help="Alias, folder or Hugging Face id of the model they are of."),
    name: str = typer.Option("imported", help="What to call them: --set stats.imported=NAME uses them."),
    layer: int | None = typer.Option(None, min=0, help="The layer of a single file; by default its name tells."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Take over second moments that were gathered by ROME's or MEMIT's code."""
    from everedit.engine.moments import Corpus, MomentStore
    from everedit.engine.npz import import_moments, layer_of
    from everedit.engine.spread import check_layers
    from everedit.errors import EditError
    from everedit.models import load_model

    if layer is not None and len(files) > 1:
        raise EditError(what="one layer is given for several files", where="--layer", fix="import them one by one")
    lm = load_model(model)
    store = MomentStore(lm, Corpus(imported=name))
    wanted = [layer_of(file, lm.layout) if layer is None else layer for file in files]
    check_layers(tuple(wanted), lm.layout.n_layers)
    kept = import_moments(store, dict(zip(wanted, files, strict=True)))
    if json:
        show_json({"name": name, "files": {number: str(file) for number, file in kept.items()}})
    else:
        layers = ", ".join(map(str, sorted(kept)))
        terminal.print(f"imported layers {layers}; use them with: --set stats.imported={name}", soft_wrap=True)


def _layers(text: str) -> tuple[int, ...]:
    from everedit.errors import EditError

    try:
        parts = [part.split("-") for part in text.split(",")]
        return tuple(layer for part in parts for layer in range(int(part[0]), int(part[-1]) + 1))
    except ValueError as error:
        raise EditError(what=f"'{text}' names no layers", where="--layers", fix="write 14-16 or 5,8,11") from error
