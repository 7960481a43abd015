"""Write ``report.html`` for a run folder: read the files, render the page, put it in place at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everedit.report.pages import REPORT_NAME, readable, write_page
from everedit.report.results import (
    METRICS,
    ProtocolResult,
    Scores,
    mapping,
    mean_seconds,
    norm_ratios,
    number,
    peak_memory_mb,
    protocol_results,
    seconds_by_phase,
)
from everedit.report.run_files import Record, RunFiles, load_run
from everedit.report.wording import METRIC_MEANINGS, explain, headline, percent, score_text, subline

_SAMPLE_KINDS = {
    "rewrite": "Edited questions",
    "rephrase": "Rephrased questions",
    "locality": "Unrelated questions",
    "portability": "Questions that follow from an edit",
}
_SAID_ELSEWHERE = ("command", "versions", "explanations")
_MOST_SAMPLES = 60
_MOST_QUARANTINED = 200
_LONGEST_TEXT = 600


def write_report(run_dir: Path) -> Path:
    """Write the HTML page of a run folder and return its path (``report.html`` in that folder).

    An earlier page is replaced only once the new one is complete.

    Raises:
        RunFolderError: the folder or its ``config.json`` is missing, a file in it is malformed, or the
            page cannot be written.
        EvereditError: the ``report`` extra is not installed.
    """
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    return write_page(run_dir / REPORT_NAME, "run.html.j2", lambda: _page(run))


def _page(run: RunFiles) -> dict[str, Any]:
    """Return everything the template shows, already in words and strings."""
    results = protocol_results(run)
    config = run.config
    explanations = mapping(config.get("explanations"))
    return {
        "title": _title(config),
        "headline": headline(results),
        "subline": subline(results),
        "unfinished": None if run.finished else _unfinished(run),
        "facts": _facts(run),
        "meanings": METRIC_MEANINGS,
        "protocols": [_protocol(result, len(run.edits), explanations) for result in results],
        "figures": _figures(run, results),
        "samples": list(_samples(run.samples)),
        "quarantine": [_quarantined(record) for record in run.quarantine[:_MOST_QUARANTINED]],
        "quarantine_total": len(run.quarantine),
        "command": str(config.get("command") or ""),
        "config": [
            (key, value)
            for key, value in _flatten(
                {k: v for k, v in config.items() if k not in ("command", "versions", "explanations")}
            )
        ],
        "versions": [(name, str(version)) for name, version in mapping(config.get("versions")).items()],
    }


def _title(config: Record) -> str:
    how = " with ".join(str(config[key]) for key in ("method", "policy") if config.get(key))
    model = mapping(config.get("model")).get("name") or "a model"
    return f"{how or 'Edits'} on {model}"


def _unfinished(run: RunFiles) -> str:
    planned = number(config_edits) if (config_edits := run.config.get("edits")) is not None else None
    done = f"{len(run.edits):,}" + (f" of {planned:,.0f}" if planned is not None else "")
    reasons = [] if run.summary is not None else ["it has no summary yet"]
    reasons += [f"the last line of {name} is cut off" for name in run.truncated]
    return f"{done} edits are on record ({'; '.join(reasons)}). The page shows what is there."


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    model, data = mapping(run.config.get("model")), mapping(run.config.get("data"))
    parameters = number(model.get("parameters"))
    size = f", {parameters / 1e6:,.0f} M parameters" if parameters else ""
    facts = [
        ("Model", f"{model.get('name', '–')}{size}"),
        ("Method and policy", f"{run.config.get('method', '–')}, {run.config.get('policy', '–')}"),
        ("Data", str(data.get("name", "–"))),
        ("Edits", f"{len(run.edits):,}"),
    ]
    quarantined = number(mapping(run.summary).get("quarantined"))
    if quarantined is None:
        quarantined = len(run.quarantine)
    facts.append(("Records set aside", f"{quarantined:,.0f}"))
    seconds = mean_seconds(run)
    if seconds:
        # Scoring is the cost of the experiment, not of an edit.
        editing = sum(value for phase, value in seconds.items() if phase != "score")
        facts.append(("Time per edit, without scoring", f"{editing:.2f} s"))
    memory = peak_memory_mb(run)
    if memory is not None:
        facts.append(("Peak memory", f"{memory:,.0f} MB"))
    return facts


def _protocol(result: ProtocolResult, edits: int, explanations: Record) -> dict[str, Any]:
    last = result.last_checkpoint
    shown = last if last is not None else max(result.immediate_at, default=None)
    immediate = result.immediate_at.get(shown, {}) if shown is not None else {}
    retained = result.retained_at[last] if last is not None else {}
    after = f"Retained after {last:,} edit{'s' * (last != 1)}" if last is not None else "Retained"
    if result.single:
        rows = [("Unedited model", result.unedited), ("Each edit by itself, taken back before the next", immediate)]
        return _shown(result, rows, [], explanations)
    # Edits made since the last checkpoint are in neither row, so that the two rows can be compared.
    then = "Right after each edit"
    if shown is not None and shown < edits:
        then += f" up to edit {shown:,}"
    rows = [("Unedited model", result.unedited), (then, immediate), (after, retained)]
    if last in result.uncontradicted_at:
        count, scores = result.uncontradicted_at[last]
        rows.insert(2, (f"Retained, without {count:,} that a later edit contradicts", scores))
    return _shown(result, rows, [(f"{n:,}", scores) for n, scores in result.retained_at.items()], explanations)


def _shown(
    result: ProtocolResult, rows: list[tuple[str, Scores]], checkpoints: list[tuple[str, Scores]], explanations: Record
) -> dict[str, Any]:
    def cells(scores: Scores) -> list[str]:
        return [score_text(metric, scores.get(metric)) for metric in result.metrics]

    return {
        "name": result.name,
        "metrics": result.metrics,
        "explanation": explain(result.name, str(explanations.get(result.name) or "")),
        "rows": [(label, cells(scores)) for label, scores in rows],
        "checkpoints": [(label, cells(scores)) for label, scores in checkpoints],
    }


def _figures(run: RunFiles, results: list[ProtocolResult]) -> list[dict[str, str]]:
    from everedit.report.figures import most_changed, norms_figure, scores_figure, seconds_figure

    found: list[dict[str, str]] = []
    if results:
        first = results[0]
        marks = {} if first.single else first.retained_at
        retained = {m: [(n, v) for n, scores in marks.items() if (v := scores.get(m)) is not None] for m in METRICS}
        ends = [f"{m} {percent(points[-1][1])}" for m, points in retained.items() if points]
        describe = f"Last retained scores: {', '.join(ends) or 'none yet'}." if not first.single else "Running means."
        caption = f"Scores under {first.name}. Thin line: mean of the scores taken right after each edit so far."
        if not first.single:
            caption += " Line with markers: all edits so far, asked again at a checkpoint."
        svg = scores_figure(first.running, retained, describe)
        found.append({"svg": svg, "heading": "Scores as edits accumulate", "caption": caption})
    seconds = mean_seconds(run)
    describe = "Means: " + ", ".join(f"{phase} {value:.3g} s" for phase, value in seconds.items()) + "."
    svg = seconds_figure(*seconds_by_phase(run.edits), describe)
    found.append({"svg": svg, "heading": "Where the time goes", "caption": f"Seconds per edit. {describe}"})
    ratios = norm_ratios(run.checkpoints)
    caption = "Size of each edited matrix, as its norm divided by its norm before editing."
    if (extra := len(ratios) - len(most_changed(ratios))) > 0:
        caption += f" The {extra} that changed least are grey."
    describe = "; ".join(f"{name} {points[-1][1]:.4g}" for name, points in ratios.items())
    svg = norms_figure(ratios, describe)
    found.append({"svg": svg, "heading": "How far the weights moved", "caption": caption})
    return [figure for figure in found if figure["svg"]]


def _samples(records: list[Record]) -> Iterator[dict[str, Any]]:
    """Yield one group per kind of question, each with evenly chosen samples if there are many."""
    kinds = dict.fromkeys([*_SAMPLE_KINDS, *(str(record.get("kind")) for record in records)])
    for kind in kinds:
        group = [record for record in records if str(record.get("kind")) == kind]
        if not group:
            continue
        count = min(len(group), _MOST_SAMPLES)
        chosen = [group[i * len(group) // count] for i in range(count)]
        yield {
            "kind": kind,
            "heading": _SAMPLE_KINDS.get(kind, kind),
            "total": len(group),
            "samples": [_sample(record) for record in chosen],
        }


def _sample(record: Record) -> dict[str, Any]:
    target = readable(record.get("target"))
    return {
        "n": record.get("n"),
        "edit_id": readable(record.get("edit_id")),
        "prompt": _shorten(readable(record.get("prompt"))),
        "target": target,
        "base": _segments(readable(record.get("base_text")), target),
        "edited": _segments(readable(record.get("edited_text")), target),
    }


def _shorten(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}… ({len(text) - _LONGEST_TEXT:,} more characters)"


def _segments(text: str, target: str) -> list[tuple[str, bool]]:
    """Return the text cut into (part, whether this part is the target), ignoring case."""
    text, target = _shorten(text.strip()), target.strip()
    if not target:
        return [(text, False)]
    # "Rome" must not light up in "Romeo", but scripts without spaces have no such word edges.
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", target) else ""
    after = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", target) else ""
    parts = re.split(f"({before}{re.escape(target)}{after})", text, flags=re.IGNORECASE)
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def _quarantined(record: Record) -> dict[str, str]:
    return {
        "line": str(record.get("line", "–")),
        "reason": readable(record.get("reason")),
        "fix": readable(record.get("fix")),
        "record": _shorten(readable(json.dumps(record.get("record"), ensure_ascii=False))),
    }


def _flatten(value: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value) for every leaf; lists stay on one line."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            yield f"{prefix}{key}", ", ".join(str(part) for part in item)
        else:
            yield f"{prefix}{key}", item if isinstance(item, str) else json.dumps(item)
