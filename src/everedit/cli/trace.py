"""``everedit trace``: where in a model a fact is recalled."""

from __future__ import annotations

from pathlib import Path

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal


@friendly
def trace(
    model: str = typer.Option("smollm2-135m", help="Alias, folder or Hugging Face id."),
    prompt: str = typer.Option(..., help="A prompt that the model completes with the fact."),
    subject: str = typer.Option(..., help="The subject, as it stands in the prompt."),
    samples: int = typer.Option(10, help="Noisy copies."),
    window: int = typer.Option(10, help="Blocks whose MLP or attention outputs are restored together."),
    noise: float | None = typer.Option(None, help="Noise level. [three deviations of the subject's embeddings]"),
    severed: str | None = typer.Option(None, help="mlp or attention: hold these outputs of later blocks as corrupted."),
    seed: int = typer.Option(0, help="Seed of the noise."),
    out: Path = typer.Option(Path("runs/trace"), help="Folder for trace.json and trace.svg."),
    device: str | None = typer.Option(None, help="Where to compute; the best at hand by default."),
    json: bool = typer.Option(False, "--json", help="Write the result as JSON to standard output."),
) -> None:
    """Corrupt a subject, restore single states, and show which of them bring the answer back."""
    from everedit.cache import require_writable, write_json
    from everedit.engine.settings import validated
    from everedit.engine.trace import TraceConfig
    from everedit.engine.trace import trace as run
    from everedit.models import load_model

    values = {"samples": samples, "window": window, "noise": noise, "severed": severed, "seed": seed}
    config = validated(TraceConfig, values, "trace")
    require_writable(out, "trace.json", "trace.svg")
    with showing_progress() as reporter:
        reporter.stage(f"loading {model}")
        lm = load_model(model, device=device)
        reporter.stage("restoring states", len(config.kinds) * lm.layout.n_layers)
        found = run(lm, prompt, subject, config, progress=lambda done, _: reporter.step(done))
    result = {"model": model, "prompt": prompt, **found.as_dict(), "settings": config.model_dump(mode="json")}
    write_json(out / "trace.json", result)
    figure = _figure(out)
    if json:
        show_json({**result, "out": str(out), "figure": figure})
        return
    rows = []
    for kind, effects in found.effects.items():
        token, layer = divmod(int(effects.argmax()), effects.shape[1])
        rows.append((kind, repr(found.tokens[token]), layer, float(effects[token, layer])))
    show_table("Where restoring brings most of the answer back", ("restored", "token", "layer", "effect"), rows)
    drawn = figure or "none (pip install 'everedit\\[report]')"
    terminal.print(
        f"answer {found.answer!r}: probability {found.clean:.3f}, with the subject corrupted {found.corrupted:.3f}; "
        f"numbers {out / 'trace.json'}, figure {drawn}",
        soft_wrap=True,
    )


def _figure(out: Path) -> str | None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return None
    from everedit.report.trace_figure import write_trace_figure

    return str(write_trace_figure(out))
