"""Pages of docs/results that are sweeps: their file, their tables, their curves.

    python -m benchmarks.sweep_pages small [--data DATA_FOLDER] [--out docs/results] [--jobs 1] [--minutes M]

Everything is everedit's own: a sweep (``benchmarks/sweeps/NAME.yaml``), its tables and its plots. Runs are kept in
``.benchmarks/sweeps/NAME``. Interrupted, also by ``--minutes``, it goes on where it was; the page is written each time.
``benchmarks/sweeps/NAME.md``, if there is one, is what the page says before its tables.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from everedit.report.collect import Result, collect
from everedit.report.sweep_figures import figures, save_figures
from everedit.report.tables import markdown, tables

SWEEPS = Path(__file__).parent / "sweeps"
KEPT = Path(".benchmarks/sweeps")
SCORES = {
    "retained": "All T edits, with the model as it is after T",
    "uncontradicted": "The same, without edits that a later one contradicts",
}


def page(name: str, results: list[Result]) -> list[str]:
    """The lines of the page."""
    foreword = SWEEPS / f"{name}.md"
    lines = [
        foreword.read_text(encoding="utf-8").strip() if foreword.exists() else f"# {name}",
        "",
        f"Made by `python -m benchmarks.sweep_pages {name}`, which is `everedit sweep benchmarks/sweeps/{name}.yaml`,",
        "`everedit summarize` and `everedit plot`:",
        "",
        "```yaml",
        (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8").strip(),
        "```",
    ]
    for score, heading in SCORES.items():
        lines += ["", f"## {heading}", "", markdown(tables(results, score)).strip()]
    lines += ["", "## With 95% bootstrap intervals over edits, right after each edit", ""]
    lines += [markdown(tables(results, "immediate"), interval=True).strip(), "", "## Curves", ""]
    for drawn in figures(results):
        lines += [f"![{drawn.heading}]({name}/{drawn.slug}.svg)", "", f"*{drawn.caption}*", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in SWEEPS.glob("*.yaml")))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="stands for DATA in the file")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="stop after so many; the next time goes on from there")
    options = parser.parse_args()
    kept = KEPT / options.name
    kept.parent.mkdir(parents=True, exist_ok=True)
    sweep = kept.with_suffix(".yaml")
    text = (SWEEPS / sweep.name).read_text(encoding="utf-8")
    sweep.write_text(text.replace("DATA/", f"{options.data}/"), encoding="utf-8")
    words = ["sweep", str(sweep), "--out", str(kept), "--jobs", str(options.jobs), "--resume"]
    # A thread for each cell: of small products, two cells side by side make more than one with two threads.
    words += ["--threads", "1"]
    try:
        limit = options.minutes and 60 * options.minutes
        code = subprocess.run([sys.executable, "-m", "everedit", *words], check=False, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = 0
    results = collect([kept])
    for old in (options.out / options.name).glob("*.svg"):
        old.unlink()
    save_figures(results, options.out / options.name)
    text = "\n".join(page(options.name, results)).rstrip() + "\n"
    (options.out / f"{options.name}.md").write_text(text, encoding="utf-8")
    # A cell that failed has said so; what was measured is on the page.
    sys.exit(code)


if __name__ == "__main__":
    main()
