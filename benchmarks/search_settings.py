"""Search a method's settings on records that no table uses: single edits, each undone before the next, or a stream.

    python -m benchmarks.search_settings --model smollm2-135m --data zsre --data-path FILE --records 300:400 \
        --corpus TEXT.jsonl --out search.jsonl --grid '{"method": ["memit"], "layers": [[8, 9, 10]], "lr": [0.1, 0.5]}'

A grid is a JSON object of lists, or a list of such; every combination is tried. Keys of the value optimisation (lr,
steps, clamp, kl, weight_decay, stop_loss) go to the target's settings, those that begin with "policy." to the policy's,
the others to the method's. Each result is a line of ``--out``; combinations that are there already are skipped. With
``--stream`` the edits are made one after another and the scores are those of all of them at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

from everedit.data import load_edits
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.engine.target import TargetConfig
from everedit.evaluation import Evaluator
from everedit.evaluation.evaluate import average
from everedit.methods import method_class
from everedit.models import load_model

PROTOCOLS = ("teacher-forced/token-accuracy@1", "teacher-forced/all-tokens@1")


def settings_of(point: dict) -> dict:
    optimises = "target" in method_class(point["method"]).Config.model_fields
    target = {key: value for key, value in point.items() if optimises and key in TargetConfig.model_fields}
    rest = {
        key: value for key, value in point.items() if key not in target and not key.startswith(("method", "policy"))
    }
    return {**rest, "target": target} if target else rest


def policy_settings_of(point: dict) -> dict:
    return {key.removeprefix("policy."): value for key, value in point.items() if key.startswith("policy.")}


def single_edits(editor: Editor, edits: list, evaluator: Evaluator, baseline, cache: dict) -> dict:
    """Mean scores over edits made one at a time; their values are optimised together, which changes nothing."""
    start = time.perf_counter()
    editor.prepare()
    find_values(editor, edits, cache)
    values = time.perf_counter() - start
    scores: list = []
    for edit in edits:
        with editor.trial(edit, score=False):
            scores += evaluator.score([edit], baseline)
    means = average(scores)[PROTOCOLS[0]]
    return {
        **{key: round(value, 4) for key, value in means.items() if value is not None},
        "seconds": round(time.perf_counter() - start, 1),
        "value_seconds": round(values, 1),
    }


def find_values(editor: Editor, edits: list, cache: dict) -> None:
    """Let the editor find the values that its method optimises on the unedited model, once for each setting of them."""
    method = editor.method
    if not method.traits.solves_values or method.traits.chooses_layer:
        return
    key = f"{method.name} {method.layers()[-1]} {method.config.target} {method.config.contexts}"
    if key not in cache:
        cache[key] = method.targets(editor.bench, edits)
    editor._pending.update({edit.id: target for edit, target in zip(edits, cache[key], strict=True)})


def stream(editor: Editor, edits: list, evaluator: Evaluator, baseline, cache: dict) -> dict:
    """Scores of all edits at the end of a stream of them; values found on the base model are found once."""
    start = time.perf_counter()
    editor.prepare()
    if editor.policy.edits_from == "base":
        find_values(editor, edits, cache)
    for _ in editor.stream(edits):
        pass
    means = average(evaluator.score(edits, baseline))[PROTOCOLS[0]]
    growth = max(editor.norm_ratios().values(), default=1.0)
    editor.reset()
    return {
        **{key: round(value, 4) for key, value in means.items() if value is not None},
        "norm_ratio": round(growth, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-path")
    parser.add_argument("--records", default="300:400", help="half-open range of records")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--grid", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1", help="this process's share of the grid, e.g. 2/8")
    parser.add_argument("--stream", action="store_true", help="one stream of all records, scored at its end")
    parser.add_argument("--contradictions", action="store_true", help="keep records that a later one contradicts")
    options = parser.parse_args()
    first, last = map(int, options.records.split(":"))
    edits = load_edits(options.data, options.data_path, keep_contradictions=options.contradictions).edits[first:last]
    lm = load_model(options.model, dtype="float32")
    evaluator = Evaluator(lm, PROTOCOLS)
    baseline = evaluator.baseline(edits)
    done = set(options.out.read_text().splitlines()) if options.out.exists() else set()
    known = {json.dumps(json.loads(line)["point"], sort_keys=True) for line in done}
    grids = json.loads(options.grid)
    points = [
        dict(zip(grid, values, strict=True))
        for grid in ([grids] if isinstance(grids, dict) else grids)
        for values in itertools.product(*grid.values())
    ]
    cache: dict = {}
    share, of = map(int, options.shard.split("/"))
    for point in points[share::of]:
        if json.dumps(point, sort_keys=True) in known:
            continue
        corpus = Corpus(options.corpus, options.tokens)
        settings = {"method_settings": settings_of(point), "policy_settings": policy_settings_of(point)}
        editor = Editor(lm, point["method"], point.get("policy", "accumulate"), corpus=corpus, **settings)
        measure = stream if options.stream else single_edits
        row = {
            "data": options.data,
            "point": point,
            **measure(editor, edits, evaluator, baseline, cache),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
