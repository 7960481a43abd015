"""Editing quality on real data: every method's single edits, costs and streams, as tables and curves.

    python -m benchmarks.results --data DATA_FOLDER [--minutes M] [--methods ...] [--sets ...] [--parts ...]

The data folder holds ``zsre/edit.jsonl``, ``counterfact/edit.jsonl`` and ``text/wikipedia_sample.jsonl``. Rows are
kept in ``.benchmarks/results``, one file for each experiment; one that is complete is not made again, so that the whole
may be split over several runs (``--minutes`` begins nothing new after so many). The page is written at the end of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.general_ability import text_loss
from benchmarks.plan_of_results import FAST, METHODS, Stream, streams
from benchmarks.results_page import write_page
from everedit.data import load_edits
from everedit.data.contradictions import contradicted_by
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.engine.target import Target
from everedit.engine.weights import Face
from everedit.evaluation import Evaluator
from everedit.evaluation.evaluate import Baseline, EditScores, average
from everedit.models import LanguageModel, load_model
from everedit.patch import load_tensors, save_tensors

MARKS = (1, 10, 50, 100)
LONG_MARKS = (*MARKS, 500)
# Writing freely costs many times what reading does; the mark between is for the curve.
FREE_MARKS = (1, 10, 100, 500)
TOKENS, FREE = "teacher-forced/token-accuracy@1", "free-generation/exact-match@1"
BATCH = 16
KEPT = Path(".benchmarks/results")
PARTS = ("singles", "costs", "streams")


def load_records(data: Path, name: str, count: int) -> list[Edit]:
    """The first records as they are: known answers and contradictions stay in."""
    return load_edits(name, data / name / "edit.jsonl", keep_contradictions=True).edits[:count]


@cache
def unedited(lm: LanguageModel, data: Path, name: str, count: int) -> tuple[list[Edit], Evaluator, Baseline]:
    """Records, what scores them, and what the unedited model says."""
    edits, evaluator = load_records(data, name, count), Evaluator(lm, (TOKENS, FREE))
    return edits, evaluator, evaluator.baseline(edits)


def corpus(data: Path) -> Corpus:
    return Corpus(data / "text" / "wikipedia_sample.jsonl", 131_072)


def make_editor(lm: LanguageModel, data: Path, method: str, policy: str = "accumulate", **settings: Any) -> Editor:
    editor = Editor(lm, method, policy, corpus=corpus(data), **settings)
    editor.prepare()
    return editor


def give_values(editor: Editor, edits: list[Edit], file: Path) -> None:
    """Let the editor have every edit's value on the unedited model, optimised in batches and kept in ``file``."""
    traits = editor.method.traits
    if not traits.solves_values or traits.chooses_layer:
        return
    kept = load_tensors(file)[0] if file.exists() else {}
    found = {int(key.split("|")[1]) for key in kept if key.startswith("delta")}
    for start in range(0, len(edits), BATCH):
        part = [index for index in range(start, min(start + BATCH, len(edits))) if index not in found]
        if part:
            for index, target in zip(part, editor.method.targets(editor.bench, [edits[i] for i in part]), strict=True):
                parts = {"origin": target.origin, "delta": target.delta, "before": target.before}
                kept.update({f"{name}|{index}": tensor for name, tensor in parts.items()})
            save_tensors(file, kept)
            print(f"{file.stem}: {part[-1] + 1} values", flush=True)
    unknown = torch.full_like(kept["origin|0"], float("nan"))
    for i, edit in enumerate(edits):
        before = kept.get(f"before|{i}", unknown)
        editor._pending[edit.id] = Target(kept[f"origin|{i}"], kept[f"delta|{i}"], (), 1.0, before)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, row: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def singles(lm: LanguageModel, data: Path, name: str, method: str, count: int) -> None:
    """One row for each edit, undone before the next."""
    file = KEPT / f"single_{name}_{method}.jsonl"
    done = len(rows_of(file))
    if done >= count:
        return
    edits, evaluator, baseline = unedited(lm, data, name, count)
    editor = make_editor(lm, data, method)
    give_values(editor, edits, KEPT / f"values_{name}_{method}.safetensors")
    for index in range(done, count):
        with editor.trial(edits[index], score=False):
            add(file, {"n": index + 1, "scores": evaluator.score([edits[index]], baseline)[0].scores})
    print(f"{file.stem}: done", flush=True)


def stream(lm: LanguageModel, data: Path, name: str, plan: Stream, count: int) -> None:
    """Immediate and retained scores, and the loss on ordinary text, at each mark; made whole or not at all."""
    policies = [plan.policy, *([plan.restrained] if plan.restrained else [])]
    files = {policy: KEPT / f"stream_{name}_{plan.method}_{policy}.jsonl" for policy in policies}
    if all(file.exists() for file in files.values()):
        return
    edits, evaluator, baseline = unedited(lm, data, name, count)
    settings = {"method_settings": plan.method_settings, "policy_settings": plan.policy_settings}
    editor = make_editor(lm, data, plan.method, policies[-1], **settings)
    if editor.policy.edits_from == "base":
        give_values(editor, edits, KEPT / f"values_{name}_{plan.method}.safetensors")
    start = time.perf_counter()
    rows = _checkpoints(editor, evaluator, baseline, edits, partial(text_loss, lm, corpus(data)), policies)
    found = list(rows)
    editor.reset()
    for policy, file in files.items():
        file.unlink(missing_ok=True)
        for row in found:
            if row["policy"] == policy:
                add(file, row)
    print(f"{name} {plan.method} {' '.join(policies)}: done in {time.perf_counter() - start:.0f} s", flush=True)


def _checkpoints(
    editor: Editor,
    evaluator: Evaluator,
    baseline: Baseline,
    edits: list[Edit],
    loss: Callable[[], float],
    policies: list[str],
) -> Iterator[dict]:
    """Rows of the stream as it goes on inside (the first policy), and as it is read out (the last).

    ``each`` are the retained scores edit by edit; ``contradicted`` are the edits that a later one of the T contradicts.
    """
    faces: dict[str, Face] = {policies[-1]: "shown"}
    if len(policies) > 1:
        faces = {policies[0]: "stream", **faces}
    immediate: dict[str, list] = {policy: [] for policy in policies}
    by_teacher, loss_before = Evaluator(editor.lm, (TOKENS,)), loss()
    for n, _ in enumerate(editor.stream(edits), start=1):
        for policy, face in faces.items():
            with editor._weights.showing(face):
                immediate[policy] += by_teacher.score([edits[n - 1]], baseline)
                if n in LONG_MARKS:
                    scores = (evaluator if n in FREE_MARKS else by_teacher).score(edits[:n], baseline)
                    growth = max(editor.norm_ratios().values(), default=1.0)
                    yield {
                        "policy": policy, "T": n, "immediate": average(immediate[policy]), "retained": average(scores),
                        "norm_ratio": growth, "text_loss": loss(), "text_loss_unedited": loss_before,
                        **_by_record(edits[:n], scores),
                    }  # fmt: skip


def before_any_edit(lm: LanguageModel, data: Path, name: str, count: int) -> None:
    """The unedited model's scores at each mark."""
    file = KEPT / f"unedited_{name}.jsonl"
    if not file.exists():
        edits, evaluator, baseline = unedited(lm, data, name, count)
        each = evaluator.score(edits, baseline)
        for n in (mark for mark in MARKS if mark <= count):
            add(file, {"T": n, "retained": average(each[:n]), **_by_record(edits[:n], each[:n])})


def _by_record(edits: list[Edit], scores: list[EditScores]) -> dict:
    contradicted = [index for index, by in enumerate(contradicted_by(edits)) if by is not None]
    return {"each": [score.scores for score in scores], "contradicted": contradicted}


def costs(data: Path, model: str, method: str) -> None:
    """Seconds an edit, one at a time, and the memory of a process that does nothing else."""
    file = KEPT / f"cost_{method}.json"
    if not file.exists():
        command = [sys.executable, "-m", "benchmarks.cost", "--data", str(data), "--model", model, "--method", method]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{file.stem}: done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--long", type=int, default=500, help="records of a fast method's plain stream")
    parser.add_argument("--sets", nargs="+", default=["zsre", "counterfact"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--policies", nargs="+", help="only these streams")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many minutes")
    options = parser.parse_args()
    lm = load_model(options.model, dtype="float32")
    end = time.monotonic() + 60 * options.minutes
    for job in jobs(lm, options):
        if time.monotonic() < end:
            job()
    write_page(KEPT, options.out)


def jobs(lm: LanguageModel, options: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Everything that is asked for, single edits first, then streams, the plain ones of all methods first."""
    if "costs" in options.parts:
        yield from (partial(costs, options.data, options.model, method) for method in options.methods)
    if "singles" in options.parts:
        for method, name in itertools.product(options.methods, options.sets):
            yield partial(singles, lm, options.data, name, method, options.records)
    if "streams" in options.parts:
        for name in options.sets:
            yield partial(before_any_edit, lm, options.data, name, options.records)
        plans = [plan for method in options.methods for plan in streams(method)]
        for policy, name in itertools.product(("accumulate", "simie", "nas", "rect"), options.sets):
            for plan in plans:
                if plan.policy == policy and (not options.policies or policy in options.policies):
                    long = plan.method in FAST and policy == "accumulate"
                    count = max(options.long, options.records) if long else options.records
                    yield partial(stream, lm, options.data, name, plan, count)


if __name__ == "__main__":
    main()
