"""``everedit rollback``: edit facts, edit them back with the same editor, and see what the editor leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal


@friendly
def rollback(
    model: str | None = typer.Option(None, help="Alias, folder or Hugging Face id. [smollm2-135m]"),
    method: str = typer.Option("wilke", help="See: everedit methods ls."),
    policy: str = typer.Option("accumulate", help="See: everedit policies ls."),
    data: str | None = typer.Option(None, help="A data set (everedit data ls) or a file of edits. [worldfacts]"),
    data_path: Path | None = typer.Option(None, help="The file of a data set that does not ship with Everedit."),
    edits: int = typer.Option(20, min=1, help="How many facts are edited and edited back."),
    untouched: int = typer.Option(50, min=0, help="How many further facts are only asked for."),
    checkpoints: str | None = typer.Option(None, help="After how many facts all of them are asked for. [1,10]"),
    seed: int | None = typer.Option(None, help="Seed of everything that is sampled. [0]"),
    out: Path = typer.Option(Path("runs/rollback"), help="Folder for rollback.json."),
    setting: list[str] = typer.Option([], "--set", help="method.key=value, policy.key=value, stats.key=value."),
    device: str | None = typer.Option(None, help="Where to compute; the best at hand by default."),
    json: bool = typer.Option(False, "--json", help="Write the result as JSON to standard output."),
) -> None:
    """Edit facts that the model knows and edit them back, one after another, and measure what drifts (WilKE)."""
    from everedit.experiments import RunConfig, rollback_run

    flags: dict[str, Any] = {
        "model": model, "method": method, "policy": policy, "data": data, "data_path": data_path, "edits": edits,
        "checkpoints": (checkpoints or "1,10").split(","), "seed": seed, "device": device,
    }  # fmt: skip
    config = RunConfig.build(None, flags, setting)
    with showing_progress() as reporter:
        result = rollback_run(config, untouched, out, reporter)
    if json:
        show_json({**result, "out": str(out)})
        return
    columns = ("ES", "GS", "LS", "ERS", "ORS", "S")
    rows = [(f"after {mark}", *(row[name] for name in columns)) for mark, row in result["checkpoints"].items()]
    show_table(f"{method}: edited and edited back", ("facts", *columns), rows)
    flashes = ", ".join(map(str, result["flashes"])) or "none"
    terminal.print(
        f"toxicity: flashes at updates {flashes}, buildup {result['buildup']:.2f}; numbers {out / 'rollback.json'}",
        soft_wrap=True,
    )
