"""``python -m benchmarks [values|moments|scoring|steps|…]``, all by default: measure, print a table.

Fails where a promise is not kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import ledger, memory, notes, overhead, scoring, speed, steps, table
from everedit.data import load_edits
from everedit.models import load_model

PARTS = ("values", "moments", "evaluation", "scoring", "steps", "solves", "notes", "overhead", "memory", "ledger")


def own_text(folder: Path) -> Path:
    """A text of our own sentences, so that the benchmark needs nothing from outside."""
    edits = load_edits("worldfacts").edits
    lines = [f"{prompt} {edit.ground_truth}." for edit in edits for prompt in (edit.prompt, *edit.rephrase)]
    file = folder / "text.txt"
    file.write_text("\n\n".join(lines * 2), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--figures", type=Path, default=Path("docs/results"), help="where figures go")
    options = parser.parse_args()
    lm = load_model(options.model, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        measurements = {
            "values": lambda: speed.value_optimisation(lm),
            "moments": lambda: speed.second_moments(lm, own_text(Path(folder))),
            "evaluation": lambda: speed.evaluation(lm),
            "scoring": lambda: scoring.scoring(lm),
            "steps": lambda: steps.gradient_steps(lm),
            "solves": lambda: steps.solves(lm, options.figures),
            "notes": lambda: notes.notes(lm),
            "overhead": lambda: overhead.overheads(lm),
            "memory": lambda: memory.run_of_fifty(lm),
            "ledger": lambda: ledger.ten_thousand_edits(lm),
        }
        # Said as it comes too: a measurement that fails must not take the others with it.
        rows = [table.said(row) for part in PARTS if part in options.parts for row in measurements[part]()]
    table.show(rows)
    raise SystemExit(any(row.ratio < row.bar for row in rows))


if __name__ == "__main__":
    main()
