"""Editing quality on real data: single edits, and streams of 1, 10, 50 and 100 edits, as tables and curves.

    python -m benchmarks.results --data DATA_FOLDER --out docs/results

The data folder holds ``zsre/edit.jsonl``, ``counterfact/edit.jsonl`` and ``text/wikipedia_sample.jsonl``. Rows are
kept in ``.benchmarks/results``, one file for each experiment; one that is complete is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.results_page import write_page
from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.engine.target import Target
from everedit.evaluation import Evaluator
from everedit.evaluation.evaluate import average
from everedit.models import LanguageModel, load_model
from everedit.patch import load_tensors, save_tensors

MARKS = (1, 10, 50, 100)
PROTOCOLS = ("teacher-forced/token-accuracy@1", "free-generation/exact-match@1")
BATCH = 16
KEPT = Path(".benchmarks/results")
# What streams need that single edits do not (docs/results/settings.md, "Streams"), by policy and method.
STREAM_SETTINGS: dict[str, dict[str, dict]] = {
    "accumulate": {"memit": {"method_settings": {"moment_weight": 2000.0}}, "rome": {}},
    "simie": {
        "memit": {"policy_settings": {"start": "base", "lam": 1.0}},
        "rome": {"policy_settings": {"start": "base", "lam": 10.0}},
    },
}


def load_records(data: Path, name: str, count: int) -> list[Edit]:
    """The first records as they are: known answers and contradictions stay in."""
    return load_edits(name, data / name / "edit.jsonl", keep_contradictions=True).edits[:count]


def make_editor(lm: LanguageModel, data: Path, method: str, policy: str = "accumulate", **settings) -> Editor:
    corpus = Corpus(data / "text" / "wikipedia_sample.jsonl", 131_072)
    editor = Editor(lm, method, policy, corpus=corpus, **settings)
    editor.prepare()
    return editor


def targets_of(editor: Editor, edits: list[Edit], file: Path) -> list[Target]:
    """Every edit's value on the unedited model, optimised in batches, kept in ``file``."""
    kept = load_tensors(file)[0] if file.exists() else {}
    found = {int(key.split("|")[1]) for key in kept if key.startswith("delta")}
    for start in range(0, len(edits), BATCH):
        part = [index for index in range(start, min(start + BATCH, len(edits))) if index not in found]
        if part:
            for index, target in zip(part, editor.method.targets(editor.bench, [edits[i] for i in part]), strict=True):
                parts = {"origin": target.origin, "delta": target.delta, "before": target.before}
                kept.update({f"{part}|{index}": tensor for part, tensor in parts.items()})
            save_tensors(file, kept)
            print(f"{file.stem}: {part[-1] + 1} values", flush=True)
    unknown = torch.full_like(kept["origin|0"], float("nan"))
    return [
        Target(kept[f"origin|{i}"], kept[f"delta|{i}"], (), 1.0, kept.get(f"before|{i}", unknown))
        for i in range(len(edits))
    ]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, row: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def singles(lm: LanguageModel, data: Path, name: str, method: str, edits: list[Edit]) -> list[dict]:
    """One row for each edit, undone before the next."""
    file = KEPT / f"single_{name}_{method}.jsonl"
    done = len(rows_of(file))
    if done < len(edits):
        editor = make_editor(lm, data, method)
        evaluator = Evaluator(lm, PROTOCOLS)
        baseline = evaluator.baseline(edits)
        targets = targets_of(editor, edits, KEPT / f"values_{name}_{method}.safetensors")
        for index in range(done, len(edits)):
            editor._pending[edits[index].id] = targets[index]
            with editor.trial(edits[index], score=False):
                add(file, {"n": index + 1, "scores": evaluator.score([edits[index]], baseline)[0].scores})
        print(f"{file.stem}: done", flush=True)
    return rows_of(file)


def stream(lm: LanguageModel, data: Path, name: str, method: str, label: str, edits: list[Edit]) -> list[dict]:
    """Immediate and retained scores at each mark; a stream is made whole or not at all."""
    file = KEPT / f"stream_{name}_{method}_{label}.jsonl"
    if not file.exists():
        editor = make_editor(lm, data, method, label, **STREAM_SETTINGS[label].get(method, {}))
        evaluator = Evaluator(lm, PROTOCOLS)
        baseline = evaluator.baseline(edits)
        if editor.policy.edits_from == "base":
            values = targets_of(editor, edits, KEPT / f"values_{name}_{method}.safetensors")
            editor._pending.update({edit.id: value for edit, value in zip(edits, values, strict=True)})
        rows = list(_checkpoints(editor, evaluator, baseline, edits))
        editor.reset()
        for row in rows:
            add(file, row)
        print(f"{file.stem}: done", flush=True)
    return rows_of(file)


def _checkpoints(editor: Editor, evaluator: Evaluator, baseline, edits: list[Edit]) -> Iterator[dict]:
    immediate = []
    for n, _ in enumerate(editor.stream(edits), start=1):
        immediate += evaluator.score([edits[n - 1]], baseline)
        if n in MARKS:
            retained = average(evaluator.score(edits[:n], baseline))
            growth = max(editor.norm_ratios().values())
            yield {"T": n, "immediate": average(immediate), "retained": retained, "norm_ratio": growth}
        if n % 10 == 0:
            print(f"  {n} edits", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--sets", nargs="+", default=["counterfact", "zsre"])
    parser.add_argument("--methods", nargs="+", default=["memit", "rome"])
    parser.add_argument("--streams", nargs="*", default=list(STREAM_SETTINGS))
    options = parser.parse_args()
    lm = load_model(options.model, dtype="float32")
    for name in options.sets:
        edits = load_records(options.data, name, options.records)
        for method in options.methods:
            singles(lm, options.data, name, method, edits)
            for label in options.streams:
                stream(lm, options.data, name, method, label, edits)

    write_page(KEPT, options.out)


if __name__ == "__main__":
    main()
