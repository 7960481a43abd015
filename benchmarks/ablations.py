"""Marginalia with one choice changed at a time: what each of them does for the scores of a book of notes.

    python -m benchmarks.ablations --data DATA_FOLDER [--model M] [--records 300:350] [--only NAME ...]
        [--settings JSON] [--list]

Records 300 and later of zsre/edit and counterfact/edit, which no table uses, without those that a later one
contradicts, also in other words: all in one book, scored when all are written. Rows are kept in
``.benchmarks/ablations``; one that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from everedit.data import load_edits
from everedit.data.contradictions import contradicted_by
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.evaluation import Evaluator
from everedit.evaluation.evaluate import average
from everedit.models import load_model

KEPT = Path(".benchmarks/ablations")
TEACHER, FREE = "teacher-forced/token-accuracy@1", "free-generation/exact-match@1"
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "added at the subject alone": {"span": "last"},
    "no full stop, end token": {"end": "token"},
    "no end": {"end": "none"},
    "no other wordings": {"wordings": 0},
    "one other wording": {"wordings": 1},
    "three other wordings": {"wordings": 3},
    "eight other wordings": {"wordings": 8},
    "two sampled texts, no other wordings": {"wordings": 0, "contexts": [(10, 2)]},
    "the bare prompt alone": {"frames": ["{}"], "wordings": 0},
    "the bare prompt and other wordings": {"frames": ["{}"]},
    "a question and its answer, too": {"frames": ["{}", "Question: {}\nAnswer:", "chat"]},
    **{f"weight decay {value}": {"target": {"weight_decay": value}} for value in (0.0, 0.1, 1.0)},
    **{f"until a loss of {value}": {"target": {"stop_loss": value}} for value in (0.01, 0.03, 0.1)},
    **{f"clamp {value}": {"target": {"clamp": value}} for value in (1.0, 2.0, 8.0)},
    **{f"strides of {value}": {"target": {"lr": value}} for value in (0.08, 0.12, 0.25)},
    "by Adam": {"target": {"descent": "adam", "lr": 1.5}},
    "own relations alone": {"pools": []},
    "allowed .002": {"allowed": 0.002},
    "allowed .05": {"allowed": 0.05},
}


def variations(layers: int, pools: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Return every variation's settings, with those of the layers."""
    by_layer = {f"layer {layer}": {"layer": layer} for layer in range(layers // 3, layers * 9 // 10, 2)}
    return {name: {"pools": pools, **settings} for name, settings in {**ABLATIONS, **by_layer}.items()}


def measured(editor: Editor, edits: list[Edit], evaluator: Evaluator, baseline) -> dict[str, Any]:
    """Return the scores of all edits in one book."""
    editor.prepare()
    start = time.perf_counter()
    editor.edit(edits, score=False)
    seconds = (time.perf_counter() - start) / len(edits)
    means = average(evaluator.score(edits, baseline))
    editor.reset()
    scores = {
        f"{kind} {metric}": round(value, 4)
        for kind, protocol in (("teacher", TEACHER), ("free", FREE))
        for metric, value in means[protocol].items()
        if value is not None
    }
    return {"seconds an edit": round(seconds, 3), **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--records", default="300:350", help="half-open range of records")
    parser.add_argument("--sets", nargs="+", default=["zsre", "counterfact"])
    parser.add_argument("--only", nargs="+", help="names of variations")
    parser.add_argument(
        "--settings", type=json.loads, help="only this variation: a JSON object of the method's settings"
    )
    parser.add_argument("--list", action="store_true", help="name the variations and end")
    options = parser.parse_args()
    lm = load_model(options.model, dtype="float32")
    pools = [(name, str(options.data / name / "train.jsonl")) for name in ("zsre", "counterfact")]
    wanted = variations(lm.layout.n_layers, pools)
    if options.settings:
        wanted = {json.dumps(options.settings): {"pools": pools, **options.settings}}
    if options.list:
        print("\n".join(wanted))
        return
    first, last = map(int, options.records.split(":"))
    KEPT.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(lm, (TEACHER, FREE))
    for data in options.sets:
        file = KEPT / f"{options.model}_{data}_{first}-{last}.jsonl"
        done = {json.loads(line)["name"] for line in file.read_text().splitlines()} if file.exists() else set()
        edits = load_edits(data, options.data / data / "edit.jsonl").edits[first:last]
        edits = [edit for edit, later in zip(edits, contradicted_by(edits), strict=True) if later is None]
        baseline = evaluator.baseline(edits)
        for name in options.only or wanted:
            if name in done:
                continue
            editor = Editor(lm, "marginalia", method_settings=wanted[name])
            row = {"name": name, "edits": len(edits), **measured(editor, edits, evaluator, baseline)}
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(data, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
