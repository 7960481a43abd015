"""Check the data set ``worldfacts`` against its rules; exit with status 1 and list problems if it breaks any.

Usage::

    python tools/check_worldfacts.py [FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).resolve().parents[1] / "src" / "everedit" / "data" / "worldfacts.jsonl"
KEYS = (
    "id",
    "relation",
    "prompt",
    "subject",
    "target_new",
    "ground_truth",
    "rephrase",
    "locality",
    "portability",
)
TEXT_KEYS = KEYS[:6]
PROBE_KEYS = ("prompt", "answer", "kind")
KINDS = {"locality": ("same_relation", "unrelated"), "portability": ("one_hop",)}
MIN_EDITS, MIN_RELATIONS, MIN_PER_RELATION, MAX_PER_RELATION = 360, 18, 12, 30
MAX_BYTES = 1_000_000

Record = dict[str, Any]
Problems = Iterator[str]


def mentions(text: str, name: str) -> bool:
    """Tell whether ``name`` occurs in ``text`` as whole words (upper and lower case are distinct)."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def text_problems(label: str, text: object) -> Problems:
    """Report whitespace and encoding faults in one piece of text."""
    if not isinstance(text, str) or not text:
        yield f"{label} is not a non-empty string"
        return
    if text != text.strip():
        yield f"{label} has leading or trailing white space"
    if "  " in text or "\t" in text or "\r" in text:
        yield f"{label} has doubled spaces or odd white space"
    if text != unicodedata.normalize("NFC", text):
        yield f"{label} is not in Unicode form NFC"


def shape_problems(record: Record) -> Problems:
    """Report wrong keys, types, white space and probe kinds."""
    if tuple(record) != KEYS:
        yield f"keys are {list(record)}"
        return
    for key in TEXT_KEYS:
        yield from text_problems(key, record[key])
    for key in ("rephrase", "locality", "portability"):
        if not isinstance(record[key], list):
            yield f"{key} is not a list"
            return
    for text in record["rephrase"]:
        yield from text_problems("rephrase", text)
    for key, kinds in KINDS.items():
        for probe in record[key]:
            if not isinstance(probe, dict) or tuple(probe) != PROBE_KEYS:
                yield f"{key} probe does not have the keys {PROBE_KEYS}"
                continue
            yield from text_problems(f"{key} prompt", probe["prompt"])
            yield from text_problems(f"{key} answer", probe["answer"])
            if probe["kind"] not in kinds:
                yield f"{key} probe has kind {probe['kind']!r}"


def edit_problems(record: Record, answers: set[str]) -> Problems:
    """Report faults in the edit itself: subject, target, leaks, rephrases."""
    subject, target, truth = record["subject"], record["target_new"], record["ground_truth"]
    if target.casefold() == truth.casefold():
        yield "target_new equals ground_truth"
    if target not in answers:
        yield f"target_new {target!r} is not a true answer of the relation"
    prompts = [record["prompt"], *record["rephrase"]]
    if len(record["rephrase"]) < 2:
        yield "fewer than two rephrases"
    if len(set(prompts)) != len(prompts):
        yield "prompt and rephrases are not distinct"
    for prompt in prompts:
        if subject not in prompt:
            yield f"subject is missing in {prompt!r}"
        for leak in (target, truth):
            if mentions(prompt, leak):
                yield f"{leak!r} leaks into {prompt!r}"


def probe_problems(record: Record, subjects: set[str], edited_prompts: set[str]) -> Problems:
    """Report locality probes on edited facts and portability probes that give the answer away."""
    kinds = {probe["kind"] for probe in record["locality"]}
    for kind in KINDS["locality"]:
        if kind not in kinds:
            yield f"no {kind} locality probe"
    for probe in record["locality"]:
        if probe["prompt"] in edited_prompts:
            yield f"locality prompt {probe['prompt']!r} is edited"
        if probe["kind"] == "same_relation" and probe["answer"] == record["target_new"]:
            yield "the answer of a same_relation locality probe is the new target"
        hit = sorted(name for name in subjects if mentions(probe["prompt"], name))
        if hit:
            yield f"locality prompt {probe['prompt']!r} mentions the edited subject {hit[0]!r}"
    for probe in record["portability"]:
        if record["subject"] not in probe["prompt"]:
            yield "subject is missing in a portability prompt"
        if mentions(probe["prompt"].casefold(), record["target_new"].casefold()):
            yield "the new target occurs in a portability prompt"
        if mentions(probe["prompt"], probe["answer"]):
            yield "the answer occurs in a portability prompt"
        if probe["answer"].casefold() in (record["ground_truth"].casefold(), record["target_new"].casefold()):
            yield "a portability answer equals the target or the truth"


def uniqueness_problems(records: Sequence[Record]) -> Problems:
    """Report repeated ids, prompts and edits, with the line number of the repetition."""
    seen: dict[str, set[object]] = defaultdict(set)
    uses: dict[str, set[str]] = defaultdict(set)
    for line, record in enumerate(records, start=1):
        uses[record["subject"]].add(record["relation"])
        if len(uses[record["subject"]]) > 2:
            yield f"line {line}: subject {record['subject']!r} is in more than two relations"
        values: dict[str, object] = {
            "id": record["id"],
            "prompt": record["prompt"],
            "edit": (record["subject"].casefold(), record["relation"]),
        }
        for name, value in values.items():
            if value in seen[name]:
                yield f"line {line}: {name} {value!r} is not unique"
            seen[name].add(value)


def count_problems(records: Sequence[Record]) -> Problems:
    """Report a file that is too small, has too few relations, or is out of balance."""
    counts = Counter(record["relation"] for record in records)
    if len(records) < MIN_EDITS:
        yield f"file: {len(records)} edits, at least {MIN_EDITS} wanted"
    if len(counts) < MIN_RELATIONS:
        yield f"file: {len(counts)} relations, at least {MIN_RELATIONS} wanted"
    for relation, count in sorted(counts.items()):
        if not MIN_PER_RELATION <= count <= MAX_PER_RELATION:
            yield f"file: relation {relation} has {count} edits"
    hops = {record["relation"] for record in records if record["portability"]}
    if 2 * len(hops) < len(counts):
        yield f"file: only {len(hops)} of {len(counts)} relations have portability probes"


def check(records: Sequence[Record]) -> list[str]:
    """Return one message per broken rule (an empty list for a good data set)."""
    problems = [
        f"line {line}: {problem}" for line, record in enumerate(records, start=1) for problem in shape_problems(record)
    ]
    if problems:
        return problems
    answers: dict[str, set[str]] = defaultdict(set)
    for record in records:
        answers[record["relation"]].add(record["ground_truth"])
    subjects = {record["subject"] for record in records}
    prompts = {record["prompt"] for record in records}
    for line, record in enumerate(records, start=1):
        found = list(edit_problems(record, answers[record["relation"]]))
        found += probe_problems(record, subjects, prompts)
        problems += [f"line {line}: {problem}" for problem in found]
    problems += uniqueness_problems(records)
    problems += count_problems(records)
    return problems


def load(path: Path) -> tuple[list[Record], list[str]]:
    """Read a JSON lines file; return its records and the problems of the file itself."""
    data = path.read_bytes()
    problems: list[str] = []
    if len(data) >= MAX_BYTES:
        problems.append(f"file: {len(data)} bytes, less than {MAX_BYTES} wanted")
    if b"\r" in data or not data.endswith(b"\n"):
        problems.append("file: lines must end with LF")
    records: list[Record] = []
    try:
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        return records, [*problems, f"file: not UTF-8 ({error})"]
    for number, text in enumerate(lines, start=1):
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error})")
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            problems.append(f"line {number}: not a JSON object")
    return records, problems


def print_table(records: Sequence[Record]) -> None:
    """Print edits and portability probes per relation."""
    counts = Counter(record["relation"] for record in records)
    hops = Counter(record["relation"] for record in records if record["portability"])
    print(f"{'relation':<22}{'edits':>6}{'portability':>13}")
    for relation, count in sorted(counts.items()):
        print(f"{relation:<22}{count:>6}{hops[relation]:>13}")
    print(f"{'total':<22}{len(records):>6}{sum(hops.values()):>13}")


def main() -> int:
    """Check one file and return the exit status."""
    parser = argparse.ArgumentParser(description="Check the worldfacts data set.")
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT, help="JSON lines file to check")
    args = parser.parse_args()
    records, problems = load(args.file)
    problems = problems or check(records)
    if problems:
        print("\n".join(problems))
        return 1
    print_table(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
