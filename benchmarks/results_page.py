"""The page of results: tables and curves from the rows that ``benchmarks.results`` kept."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TOKENS, FREE = "teacher-forced/token-accuracy@1", "free-generation/exact-match@1"
METRICS = ("reliability", "generalization", "locality", "portability")
NAMES = {"counterfact": "CounterFact", "zsre": "ZsRE", "memit": "MEMIT", "rome": "ROME"}
LABELS = {"accumulate": "", "simie": " + SimIE"}
STYLES = {"reliability": ("#0067a0", "o"), "generalization": ("#b84e00", "s"), "locality": ("#00785a", "^")}


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cells(scores: dict) -> str:
    return " | ".join("–" if scores[metric] is None else f"{scores[metric]:.3f}" for metric in METRICS)


def singles_table(kept: Path) -> list[str]:
    lines = [
        "| data | method | edits | protocol | reliability | generalization | locality | portability |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(kept.glob("single_*.jsonl")):
        _, data, method = file.stem.split("_")
        rows = _rows(file)
        for protocol in (TOKENS, FREE):
            means = {metric: _mean([row["scores"][protocol][metric] for row in rows]) for metric in METRICS}
            lines.append(f"| {NAMES[data]} | {NAMES[method]} | {len(rows)} | `{protocol}` | {_cells(means)} |")
    return lines


def streams_table(kept: Path, data: str) -> list[str]:
    lines = [
        "| method | T | right after each edit: rel. | gen. | loc. | port. | retained: rel. | gen. | loc. | port. "
        "| largest norm growth |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(kept.glob(f"stream_{data}_*.jsonl")):
        _, _, method, label = file.stem.split("_")
        lines += [
            f"| {NAMES[method]}{LABELS[label]} | {row['T']} | {_cells(row['immediate'][TOKENS])} "
            f"| {_cells(row['retained'][TOKENS])} | {row['norm_ratio']:.3f} |"
            for row in _rows(file)
        ]
    return lines


def streams_figure(kept: Path, data: str, out: Path) -> None:
    files = sorted(kept.glob(f"stream_{data}_*.jsonl"))
    figure = Figure(figsize=(3.1 * max(1, len(files)), 2.9), layout="constrained")
    figure.patch.set_facecolor("white")
    axes = figure.subplots(1, max(1, len(files)), sharey=True, squeeze=False)[0]
    for place, file in zip(axes, files, strict=False):
        _, _, method, label = file.stem.split("_")
        rows = _rows(file)
        for metric, (colour, marker) in STYLES.items():
            values = [row["retained"][TOKENS][metric] for row in rows]
            place.plot([row["T"] for row in rows], values, color=colour, marker=marker, label=metric)
        place.set(xscale="log", ylim=(-0.02, 1.02), title=f"{NAMES[method]}{LABELS[label]}", xlabel="edits")
        place.grid(alpha=0.3)
    axes[0].set_ylabel("retained, token accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    FigureCanvasSVG(figure).print_svg(str(out / f"streams_{data}.svg"), metadata={"Date": None})


def write_page(kept: Path, out: Path) -> None:
    """Write ``quality.md`` and its figures into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Editing quality on SmolLM2-135M-Instruct",
        "",
        "Made by `make results DATA=FOLDER` (`python -m benchmarks.results --data FOLDER`): the first 100 records of",
        "`zsre/edit.jsonl` and `counterfact/edit.jsonl`, as they are, with answers that the model knows already and",
        "records that contradict each other left in. Settings are the defaults for this model, found on other records",
        "([how](settings.md)); second moments over 131,072 tokens of Wikipedia; float32 on a CPU. Locality counts",
        "answers equal to the unedited model's own.",
        "",
        "## Single edits, each undone before the next",
        "",
        *singles_table(kept),
    ]
    for data in ("zsre", "counterfact"):
        if not list(kept.glob(f"stream_{data}_*.jsonl")):
            continue
        streams_figure(kept, data, out)
        lines += [
            "",
            f"## Streams on {NAMES[data]}",
            "",
            f"![retained scores against the number of edits, {NAMES[data]}](streams_{data}.svg)",
            "",
            f"Teacher-forced token accuracy (`{TOKENS}`). T edits have been made one after another; *retained* is the",
            "mean over all T of them with the model as it then is. SimIE edits the base model (`policy.start=base`);",
            "settings of streams were searched as streams ([how](settings.md)).",
            "",
            *streams_table(kept, data),
        ]
    (out / "quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
