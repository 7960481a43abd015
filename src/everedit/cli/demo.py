"""``everedit demo``: the main job on a real model, in a few minutes."""

from __future__ import annotations

import json as json_library
from pathlib import Path

import typer

from everedit.cli.console import friendly, show_table, terminal
from everedit.cli.run import execute


@friendly
def demo(
    edits: int = typer.Option(50, help="How many edits of the built-in data set."),
    out: Path | None = typer.Option(None, help="The run folder; a new one under runs/ by default."),
) -> None:
    """Correct 50 facts in a small real model, one after another, and show what it costs and what it keeps."""
    from everedit.experiments import RunConfig

    folder = out or _fresh(Path("runs"))
    config = RunConfig.build(
        None,
        {
            "method": "memit",
            "policy": "simie",
            "policy_settings": {"start": "base"},
            "data": "worldfacts",
            "edits": edits,
            "checkpoints": [1, 10, edits],
            # The kindest protocol and the strictest.
            "protocols": ["teacher-forced/token-accuracy@1", "free-generation/exact-match@1"],
        },
        # For minutes rather than accuracy: less text for the statistics, half of the contexts around a prompt.
        ["stats.tokens=4096", "method.contexts=[[10, 3]]"],
    )
    execute(config, folder)
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    asked = [s for s in map(json_library.loads, filter(None, lines)) if s["kind"] == "rewrite"]
    # A sentence to be finished shows more than a question, which a base model likes to answer with a line break.
    rewrites = [s for s in asked if not s["prompt"].endswith("?")] or asked
    # First and last of the stream and one from the middle: old edits must hold as well as new ones.
    chosen = [rewrites[0], rewrites[len(rewrites) // 2], rewrites[-1]]
    rows = [(s["prompt"], s["target"], s["base_text"].strip(), s["edited_text"].strip()) for s in chosen]
    show_table(
        "Free answers after the whole stream", ("prompt", "target", "unedited model", "edited model"), rows, short=False
    )
    terminal.print(f"open in a browser: {(folder / 'report.html').resolve()}", soft_wrap=True)


def _fresh(root: Path) -> Path:
    number = 1
    while (root / f"demo-{number}").exists():
        number += 1
    return root / f"demo-{number}"
