"""Train the editors that need it for SmolLM2, and write docs/results/training.md: commands, curves, times, figures.

    python -m benchmarks.trainings --data DATA_FOLDER [--only mend-zsre ...] [--out docs/results]

Networks are kept in ``.benchmarks/training/NAME``; a training that was interrupted goes on, one that ended is not made
again, and then its single edits are measured on records that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

KEPT = Path(".benchmarks/training")
MODEL = "smollm2-135m"
TOKENS = "teacher-forced/token-accuracy@1"
METRICS = ("reliability", "generalization", "locality")
_COLOURS = {
    "reliability": "#0067a0",
    "generalization": "#b84e00",
    "locality": "#00785a",
    "in_scope": "#8a4f9e",
    "out_of_scope": "#b0892f",
}
# Learning rates are higher than the published ones: minutes on two cores, not days.
_MEND = "--check-every 200 --set held_out=50 --set accumulation=4 --set method.lr=0.0003 --set method.rank=512"
_SERAC = (
    "--check-every 50 --set held_out=50 --set batch=4 --set accumulation=1 --set method.lr=0.0001 "
    "--set method.all_negatives=true"
)
TRAININGS = {
    "mend-zsre": f"--steps 1600 {_MEND}",
    "mend-counterfact": f"--steps 1000 {_MEND}",
    "serac-zsre": f"--steps 400 {_SERAC}",
    "serac-counterfact": f"--steps 200 {_SERAC}",
    "ke-zsre": "--steps 600 --check-every 100 --set held_out=50 --set batch=4 --set method.objective=weighted "
    "--set method.lr=0.001",
}


def _everedit(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "everedit", *words], check=True)


def command(name: str, data: str) -> list[str]:
    """The words after ``everedit`` that train ``name`` (METHOD-DATA) on the files below ``data``."""
    method, of = name.split("-", 1)
    where = ["--data", of, "--data-path", f"{data}/{of}/train.jsonl"]
    return ["train", method, "--model", MODEL, *where, *TRAININGS[name].split()]


def train(name: str, data: Path) -> None:
    """Train, or go on."""
    folder, log = KEPT / name, KEPT / f"{name}.json"
    if log.exists():
        return
    start = time.monotonic()
    words = ["train", "--resume"] if folder.exists() else command(name, str(data))
    _everedit(*words, "--out", str(folder))
    log.write_text(json.dumps({"seconds": round(time.monotonic() - start)}))


def single_edits(name: str, data: Path, count: int) -> None:
    """Score edits that are taken back one by one."""
    method, of = name.split("-", 1)
    out = KEPT / f"{name}-singles"
    if not (out / "metrics.jsonl").exists():
        words = ["run", "--model", MODEL, "--method", method, "--data", of, "--data-path", f"{data}/{of}/edit.jsonl"]
        settings = [f"method.checkpoint={KEPT / name}", "single=true", f"edits={count}", "known=keep"]
        settings += ["contradictions=keep", f"protocols=[{TOKENS}]"]
        _everedit(*words, "--out", str(out), *(word for setting in settings for word in ("--set", setting)))


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def curves(names: list[str], out: Path) -> None:
    """Draw every training's validation figures against its passes."""
    figure = Figure(figsize=(3.4 * len(names), 2.9), layout="constrained")
    figure.patch.set_facecolor("white")
    places = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for place, name in zip(places, names, strict=True):
        checks = [row for row in rows(KEPT / name / "metrics.jsonl") if row["kind"] == "validation"]
        for metric, colour in _COLOURS.items():
            points = [(row["step"], row[metric]) for row in checks if metric in row]
            if points:
                label = metric.replace("_", " ")
                place.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
        place.set(title=name, xlabel="passes", ylim=(0, 1.02))
        place.grid(alpha=0.3)
        place.legend(frameon=False, fontsize=7)
    places[0].set_ylabel("share, on held-out records")
    FigureCanvasSVG(figure).print_svg(str(out / "training.svg"), metadata={"Date": None})


def page(names: list[str], count: int) -> list[str]:
    """The lines of the page."""
    lines = [
        "# Trained editors on SmolLM2-135M-Instruct",
        "",
        "Made by `python -m benchmarks.trainings --data FOLDER`: each editor is trained by `everedit train` on the",
        "`train.jsonl` of a data set and measured on single edits of its `edit.jsonl`, unseen before: the first",
        f"{count} records, each undone before the next, teacher-forced token accuracy. Two cores, float32; minutes as",
        "they came, on a machine with other work beside it.",
        "",
        "| training | passes | best at | minutes | single edits: reliability | generalization | locality |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        card = json.loads((KEPT / name / "card.json").read_text())
        minutes = json.loads((KEPT / f"{name}.json").read_text())["seconds"] / 60
        passes = rows(KEPT / name / "metrics.jsonl")[-1]["step"]
        found = rows(KEPT / f"{name}-singles" / "metrics.jsonl")[-1]["retained"][TOKENS]
        cells = " | ".join(f"{found[metric]:.3f}" for metric in METRICS)
        lines.append(f"| {name} | {passes:,} | {card['step']:,} | {minutes:.0f} | {cells} |")
    lines += ["", "![validation figures against passes](training.svg)", "", "```"]
    lines += ["everedit " + " ".join(command(name, "DATA")) + f" --out {name}" for name in names]
    return [*lines, "```", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        train(name, options.data)
        single_edits(name, options.data, options.records)
    done = [name for name in TRAININGS if (KEPT / f"{name}-singles" / "metrics.jsonl").exists()]
    options.out.mkdir(parents=True, exist_ok=True)
    curves(done, options.out)
    (options.out / "training.md").write_text("\n".join(page(done, options.records)), encoding="utf-8")


if __name__ == "__main__":
    main()
