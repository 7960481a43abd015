"""``everedit run``: a stream of edits, scored, saved and reported."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everedit.cli.console import friendly, show_json, show_table, showing_progress, terminal

if TYPE_CHECKING:
    from everedit.experiments import RunConfig


@friendly
def run(
    model: str | None = typer.Option(None, help="Alias, folder or Hugging Face id. [smollm2-135m]"),
    method: str | None = typer.Option(None, help="See: everedit methods ls. [memit]"),
    policy: str | None = typer.Option(None, help="See: everedit policies ls. [accumulate]"),
    data: str | None = typer.Option(None, help="A data set (everedit data ls) or a file of edits. [worldfacts]"),
    data_path: Path | None = typer.Option(None, help="The file of a data set that does not ship with Everedit."),
    edits: int | None = typer.Option(None, help="How many edits. [50]"),
    batch: int | None = typer.Option(None, help="How many edits are made at once. [1]"),
    checkpoints: str | None = typer.Option(None, help="After how many edits all are scored. [1,10,50]"),
    protocols: str | None = typer.Option(None, help="See: everedit protocols ls. [the four general ones]"),
    seed: int | None = typer.Option(None, help="Seed of everything that is sampled. [0]"),
    out: Path = typer.Option(Path("runs/latest"), help="The run folder."),
    setting: list[str] = typer.Option(
        [], "--set", help="method.key=value, policy.key=value, stats.key=value, key=value."
    ),
    config: Path | None = typer.Option(None, help="A YAML file with the same keys; flags win over it."),
    device: str | None = typer.Option(None, help="Where to compute; the best at hand by default."),
    plan: bool = typer.Option(False, "--plan", help="Show what would be done and what it would cost, and stop."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out where it was interrupted."),
    json: bool = typer.Option(False, "--json", help="Write the summary as JSON to standard output."),
) -> None:
    """Make a stream of edits, score it right after each edit and at checkpoints, and write a run folder."""
    from everedit.experiments import RunConfig

    if resume:
        execute(None, out, json=json)
        return
    marks = checkpoints.split(",") if checkpoints else None
    names = [name.strip() for name in protocols.split(",")] if protocols else None
    flags: dict[str, Any] = {
        "model": model, "method": method, "policy": policy, "data": data, "data_path": data_path, "edits": edits,
        "batch": batch, "checkpoints": marks, "protocols": names, "seed": seed, "device": device,
    }  # fmt: skip
    resolved = RunConfig.build(config, flags, setting)
    if plan:
        show_plan(resolved, json=json)
    else:
        execute(resolved, out, json=json)


def execute(config: RunConfig | None, out: Path, *, json: bool = False) -> dict[str, Any]:
    """Start a run, or with no config resume the one in ``out``; show its summary and write its report."""
    from everedit import experiments

    command = shlex.join(["everedit", *sys.argv[1:]])
    try:
        with showing_progress() as reporter:
            if config is None:
                summary = experiments.resume(out, reporter=reporter)
            else:
                summary = experiments.start(config, out, reporter=reporter, command=command)
    except KeyboardInterrupt:
        if (out / "config.json").exists():
            how = f"everedit run --resume --out {shlex.quote(str(out))}"
            terminal.print(f"finished edits are kept; go on with: [bold]{how}[/]", soft_wrap=True)
        raise
    report = _report(out)
    if json:
        show_json({**summary, "out": str(out), "report": report})
    else:
        show_summary(summary, out)
        terminal.print(
            f"report: {report}" if report else "for a report: pip install 'everedit\\[report]'", soft_wrap=True
        )
    return summary


def _report(out: Path) -> str | None:
    from everedit.report import can_report, write_report

    return str(write_report(out).resolve()) if can_report() else None


def show_summary(summary: dict[str, Any], out: Path) -> None:
    """Show the tables of a finished run."""
    for name, scores in summary["protocols"].items():
        metrics = list(scores["unedited"])
        last = list(scores["checkpoints"])[-1]
        at_end = scores["checkpoints"][last]
        rows = [
            ("unedited", *scores["unedited"].values()),
            ("after each edit", *(at_end["immediate"][metric] for metric in metrics)),
        ]
        if not summary["single"]:
            rows.append((f"retained after {last}", *(at_end["retained"][metric] for metric in metrics)))
        if contradicted := summary["contradicted"][last]:
            row = f"less {contradicted} contradicted"
            rows.append((row, *(at_end["uncontradicted"].get(metric) for metric in metrics)))
        show_table(name, ("model", *metrics), rows)
    if "ability" in summary:
        show_ability(summary["ability"])
    seconds = summary["seconds_per_edit"]
    show_table("Seconds per edit", seconds.keys(), [seconds.values()])
    once = ", ".join(f"{phase} {value:.1f} s" for phase, value in summary["seconds_before"].items())
    terminal.print(
        f"{summary['edits']} edits, {summary['quarantined']} records set aside, "
        f"before the first edit {once}, peak memory {summary['peak_memory_mb']:.0f} MiB, run folder {out}",
        soft_wrap=True,
    )


def show_ability(found: dict[str, Any]) -> None:
    """Show the general ability of the unedited model and of the model at the last checkpoint."""
    last, at_end = list(found["checkpoints"].items())[-1]
    rows = [
        (task, name, value, at_end[task]["figures"][name])
        for task, item in found["unedited"].items()
        for name, value in item["figures"].items()
    ]
    show_table("General ability", ("task", "figure", "unedited", f"after {last}"), rows)


def show_plan(config: RunConfig, *, json: bool = False) -> None:
    """Show what a run would do."""
    from everedit.experiments import make_plan
    from everedit.experiments.run import make_editor
    from everedit.models import load_model

    plan = make_plan(
        config, make_editor(load_model(config.model, device=config.device, dtype=config.dtype), config)
    ).as_dict()
    if json:
        show_json(plan)
        return
    layout = plan.pop("model")
    show_table("Model", ("part", "found"), [(key, str(value)) for key, value in layout.items()])
    rows = [(key.replace("_", " "), ", ".join(map(str, v)) if isinstance(v, list) else v) for key, v in plan.items()]
    show_table("Plan (times and memory are estimates)", ("what", "value"), rows)
