"""A reduced version of the tables in docs/results, from built-in facts alone: what ``make results-small`` makes.

    python -m benchmarks.results_small [--out docs/results] [--jobs 2]

Everything is everedit's own: a sweep (``benchmarks/results_small.yaml``), its tables and its plots. Interrupted, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from everedit.report.collect import Result, collect
from everedit.report.sweep_figures import figures, save_figures
from everedit.report.tables import markdown, tables

SWEEP = Path(__file__).with_suffix(".yaml")
KEPT = Path(".benchmarks/results-small")


def page(results: list[Result], pictures: Path) -> list[str]:
    """The lines of the page; ``pictures`` is the folder of its figures, seen from the page."""
    titles = {drawn.slug: drawn for drawn in figures(results)}
    lines = [
        "# A reduced version of the tables",
        "",
        "Made by `make results-small`: `everedit sweep benchmarks/results_small.yaml`, `everedit summarize` and",
        "`everedit plot`. Nothing but the built-in facts and the packaged model is needed. Twenty edits say little",
        "about long streams, and the intervals below say how little they say at all; the tables that count are in",
        "[quality](quality.md).",
        "",
        "```yaml",
        SWEEP.read_text(encoding="utf-8").strip(),
        "```",
        "",
        "## Scores",
        "",
        markdown(tables(results)).strip(),
        "",
        "## With 95% bootstrap intervals over edits, right after each edit",
        "",
        markdown(tables(results, "immediate"), interval=True).strip(),
        "",
        "## Curves",
        "",
    ]
    for slug, drawn in titles.items():
        lines += [f"![{drawn.heading}]({pictures}/{slug}.svg)", "", f"*{drawn.caption}*", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    words = ["sweep", str(SWEEP), "--out", str(KEPT), "--jobs", str(options.jobs), "--resume"]
    done = subprocess.run([sys.executable, "-m", "everedit", *words], check=False)
    results = collect([KEPT])
    for old in (options.out / "small").glob("*.svg"):
        old.unlink()
    save_figures(results, options.out / "small")
    text = "\n".join(page(results, Path("small"))).rstrip() + "\n"
    (options.out / "small.md").write_text(text, encoding="utf-8")
    # A cell that failed has said so; what was measured is on the page.
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
