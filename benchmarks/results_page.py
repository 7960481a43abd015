"""The page of results: tables and curves from the rows that ``benchmarks.results`` kept."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.plan_of_results import METHODS

TOKENS, FREE = "teacher-forced/token-accuracy@1", "free-generation/exact-match@1"
METRICS = ("reliability", "generalization", "locality", "portability")
TRIANGLE = METRICS[:3]
SETS = {"zsre": "ZsRE", "counterfact": "CounterFact"}
NAMES = {"alphaedit": "AlphaEdit", "rlsedit": "RLSEdit", "wilke": "WilKE", "ultraedit": "UltraEdit", "lora": "LoRA"}
POLICIES = {
    "accumulate": ("", "#555555"),
    "simie": (" + SimIE", "#0067a0"),
    "nas": (" + NAS", "#b84e00"),
    "prune": (" + PRUNE", "#00785a"),
    "rect": (" + RECT", "#8a4f9e"),
    "nas+prune": (" + NAS + PRUNE", "#b0892f"),
}
PANELS_A_ROW = 5


def title(method: str, policy: str = "accumulate") -> str:
    """A method's name in print, with its policy."""
    return NAMES.get(method, method.upper()) + POLICIES[policy][0]


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cells(scores: dict, metrics: tuple[str, ...] = METRICS) -> str:
    return " | ".join("–" if scores[metric] is None else f"{scores[metric]:.3f}" for metric in metrics)


def _found(kept: Path, data: str) -> list[tuple[str, str, list[dict]]]:
    """The streams that are there: method, policy, rows; in the plan's order."""
    files = [(method, policy) for method in METHODS for policy in POLICIES]
    found = [(m, p, _rows(kept / f"stream_{data}_{m}_{p}.jsonl")) for m, p in files]
    return [(method, policy, rows) for method, policy, rows in found if rows]


def singles_table(kept: Path) -> list[str]:
    """Every method's single edits on both data sets."""
    lines = [
        "| data | method | edits | reliability | generalization | locality | portability "
        "| reliability, written freely |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data, name in SETS.items():
        for method in METHODS:
            rows = _rows(kept / f"single_{data}_{method}.jsonl")
            if rows:
                means = {metric: _mean([row["scores"][TOKENS][metric] for row in rows]) for metric in METRICS}
                free = {"reliability": _mean([row["scores"][FREE]["reliability"] for row in rows])}
                cells = f"{_cells(means)} | {_cells(free, ('reliability',))}"
                lines.append(f"| {name} | {title(method)} | {len(rows)} | {cells} |")
    return lines


def costs_table(kept: Path) -> list[str]:
    """Every method's seconds and memory."""
    lines = ["| method | seconds an edit | peak memory, MiB |", "|---|---|---|"]
    for method in METHODS:
        for row in _rows(kept / f"cost_{method}.json"):
            lines.append(f"| {title(method)} | {row['seconds']:.2f} | {row['peak_mb']:,.0f} |")
    return lines


def streams_table(kept: Path, data: str) -> list[str]:
    """Every stream at every mark."""
    lines = [
        "| stream | T | right after each edit: rel. | gen. | loc. | port. | retained: rel. | gen. | loc. | port. "
        "| largest norm growth | loss on text |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, policy, rows in _found(kept, data):
        for row in rows:
            loss = f"{row['text_loss']:.2f}" if "text_loss" in row else "–"
            lines.append(
                f"| {title(method, policy)} | {row['T']} | {_cells(row['immediate'][TOKENS])} "
                f"| {_cells(row['retained'][TOKENS])} | {row['norm_ratio']:.3f} | {loss} |"
            )
    return lines


def answers_table(kept: Path, data: str) -> list[str]:
    """Every stream at its marks, asked freely too, on all records and on those that no later record contradicts."""
    lines = [
        "| stream | T | freely: rel. | gen. | loc. "
        "| not contradicted | rel. | gen. | loc. | freely: rel. | gen. | loc. |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    unedited = _rows(kept / f"unedited_{data}.jsonl")
    named = [("unedited", row) for row in unedited]
    named += [(title(method, policy), row) for method, policy, rows in _found(kept, data) for row in rows]
    for name, row in named:
        if FREE in row["retained"]:
            gone = set(row["contradicted"])
            left = [scores for index, scores in enumerate(row["each"]) if index not in gone]
            of_left = [
                _cells({metric: _mean([scores[protocol][metric] for scores in left]) for metric in TRIANGLE}, TRIANGLE)
                for protocol in (TOKENS, FREE)
            ]
            cells = " | ".join([_cells(row["retained"][FREE], TRIANGLE), str(len(left)), *of_left])
            lines.append(f"| {name} | {row['T']} | {cells} |")
    return lines


def streams_figure(kept: Path, data: str, metric: str, out: Path) -> None:
    """Retained scores against the number of edits: a panel for each method, a line for each policy."""
    streams = _found(kept, data)
    methods = [method for method in METHODS if any(method == found for found, _, _ in streams)]
    height = -(-len(methods) // PANELS_A_ROW)
    figure = Figure(figsize=(2.6 * PANELS_A_ROW, 2.5 * height + 0.4), layout="constrained")
    figure.patch.set_facecolor("white")
    axes = figure.subplots(height, PANELS_A_ROW, sharey=True, squeeze=False).flatten()
    for place, method in zip(axes, methods, strict=False):
        for found, policy, rows in streams:
            if found == method:
                values = [row["retained"][TOKENS][metric] for row in rows]
                label, colour = POLICIES[policy]
                label = label.removeprefix(" + ") or "alone"
                place.plot([row["T"] for row in rows], values, color=colour, marker="o", markersize=3, label=label)
        place.set(xscale="log", ylim=(-0.02, 1.02), title=title(method), xlabel="edits")
        place.grid(alpha=0.3)
        place.legend(frameon=False, fontsize=7)
    for place in axes[len(methods) :]:
        place.set_axis_off()
    for place in axes[::PANELS_A_ROW]:
        place.set_ylabel(f"retained {metric}")
    FigureCanvasSVG(figure).print_svg(str(out / f"streams_{data}_{metric}.svg"), metadata={"Date": None})


def _streams_section(kept: Path, data: str, out: Path) -> list[str]:
    lines = ["", f"## Streams on {SETS[data]}", ""]
    for metric in ("reliability", "locality"):
        streams_figure(kept, data, metric, out)
        lines.append(f"![retained {metric} against the number of edits](streams_{data}_{metric}.svg)")
    return [
        *lines,
        "",
        f"Teacher-forced token accuracy (`{TOKENS}`). T edits have been made one after another; *retained* is the",
        "mean over all T of them with the model as it then is. *Loss on text* is the mean loss a token on 4,096 tokens",
        "of Wikipedia that no statistics have seen, the general ability that is left.",
        "",
        *streams_table(kept, data),
        "",
        f"What is still there when the model answers freely (`{FREE}`), and of the records that no later one of the T",
        "contradicts, also in other words: of two answers to one question no editor can keep both.",
        "",
        *answers_table(kept, data),
    ]


def write_page(kept: Path, out: Path) -> None:
    """Write ``quality.md`` and its figures into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Editing quality on SmolLM2-135M-Instruct",
        "",
        "Made by `make results DATA=FOLDER` (`python -m benchmarks.results --data FOLDER`), which may be interrupted",
        "and split (`make results DATA=FOLDER ARGS='--minutes 60 --sets zsre'`): the first 100 records of",
        "`zsre/edit.jsonl` and `counterfact/edit.jsonl`, as they are, with answers that the model knows already and",
        "records that contradict each other left in. Settings are the defaults for this model, found on other records",
        "([how](settings.md)), and those of streams as in `benchmarks/plan_of_results.py`; second moments over 131,072",
        "tokens of Wikipedia; float32 on a CPU. Locality counts answers equal to the unedited model's own.",
        "",
        "## Single edits, each undone before the next",
        "",
        *singles_table(kept),
    ]
    costs = costs_table(kept)
    if len(costs) > 2:
        lines += [
            "",
            "## Costs",
            "",
            "One edit at a time on two cores, scoring left out, the median of five; memory is that of the whole",
            "process, with the second moments of the layers that the method needs.",
            "",
            *costs,
        ]
    for data in SETS:
        if _found(kept, data):
            lines += _streams_section(kept, data, out)
    (out / "quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
