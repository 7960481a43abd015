"""``everedit train``: make the networks of a method that learns to edit."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal

if TYPE_CHECKING:
    from everedit.training import TrainConfig


@friendly
def train(
    method: str = typer.Argument("mend", help="See: everedit methods ls; those that need training."),
    model: str = typer.Option("smollm2-135m", help="Alias, folder or Hugging Face id."),
    data: str = typer.Option("worldfacts", help="A data set (everedit data ls) or a file of edits."),
    data_path: Path | None = typer.Option(None, help="The file of a data set that does not ship with Everedit."),
    validation: str | None = typer.Option(None, help="Data set to validate on; else the last records of the data."),
    validation_path: Path | None = typer.Option(None, help="Its file."),
    steps: int | None = typer.Option(None, help="Most passes over a batch; as published by default."),
    batch: int | None = typer.Option(None, help="Examples in a pass, edited together."),
    check_every: int | None = typer.Option(None, help="Passes between validations, when all is saved too."),
    patience: int | None = typer.Option(None, help="Passes without a better validation after which it stops."),
    seed: int = typer.Option(0, help="Seed of the networks and of the order of the data."),
    out: Path = typer.Option(Path("runs/training"), help="The folder of the checkpoint."),
    setting: list[str] = typer.Option([], "--set", help="method.key=value, or key=value of the loop."),
    device: str | None = typer.Option(None, help="Where to compute; the best at hand by default."),
    plan: bool = typer.Option(False, "--plan", help="Show memory and time, from two passes, and stop."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the training in --out where it was saved last."),
    json: bool = typer.Option(False, "--json", help="Write the result as JSON to standard output."),
) -> None:
    """Train a method's networks on a data set of edits; --out is then its checkpoint."""
    from everedit.training import plan_training

    flags: dict[str, Any] = {
        "method": method, "model": model, "data": data, "data_path": data_path, "validation": validation,
        "validation_path": validation_path, "steps": steps, "batch": batch, "check_every": check_every,
        "patience": patience, "seed": seed, "device": device,
    }  # fmt: skip
    if plan:
        with showing_progress() as reporter:
            found = plan_training(_config(flags, setting), reporter).as_dict()
        if json:
            show_json(found)
        else:
            rows = [(key.replace("_", " "), value) for key, value in found.items()]
            show_table("Plan (times and memory are estimates)", ("what", "value"), rows)
        return
    card = _run(None if resume else _config(flags, setting), out)
    if json:
        show_json({**card, "out": str(out)})
        return
    rows = [(name, value) for name, value in card["validation"].items()]
    show_table(
        f"{card['method']} on {card['data']['name']}, best at step {card['step']}", ("validation", "value"), rows
    )
    terminal.print(f"use it with: --method {card['method']} --set method.checkpoint={out}", soft_wrap=True)


def _config(flags: dict[str, Any], settings: list[str]) -> TrainConfig:
    from everedit.engine.settings import validated
    from everedit.experiments.config import apply_settings
    from everedit.training import TrainConfig

    values = {key: value for key, value in flags.items() if value is not None}
    apply_settings(values, settings)
    return validated(TrainConfig, values, "training")


def _run(config: TrainConfig | None, out: Path) -> dict[str, Any]:
    from everedit import training

    command = shlex.join(["everedit", *sys.argv[1:]])
    try:
        with showing_progress() as reporter:
            if config is None:
                return training.resume(out, reporter=reporter)
            return training.train(config, out, reporter=reporter, command=command)
    except KeyboardInterrupt:
        if (out / "config.json").exists():
            how = f"everedit train --resume --out {shlex.quote(str(out))}"
            terminal.print(f"what was saved last is kept; go on with: [bold]{how}[/]", soft_wrap=True)
        raise
