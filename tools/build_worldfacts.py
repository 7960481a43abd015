"""Write the built-in data set ``worldfacts`` (``src/everedit/data/worldfacts.jsonl``).

Where the facts come from: plain public knowledge typed in by hand in ``worldfacts_tables.py`` (countries,
cities, rivers, books, paintings, inventors, elements and so on).  Every sentence is our own wording; none is
copied from another data set.  The counterfactual target of an edit is the true answer of another subject of
the same relation.  Nothing is downloaded, and the random choices come from a seeded generator, so that a
rerun writes the same bytes.

Rerun from the repository root::

    python tools/build_worldfacts.py
    python tools/check_worldfacts.py
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from worldfacts_tables import RELATIONS, UNRELATED, Relation

SEED = 20240229
OUTPUT = Path(__file__).resolve().parents[1] / "src" / "everedit" / "data" / "worldfacts.jsonl"

Record = dict[str, Any]


def usable_bridge(relation: Relation, edited: dict[str, set[str]]) -> dict[str, str]:
    """Return the bridge facts of ``relation`` that no edit of the data set changes."""
    changed = edited.get(relation.via, set())
    return {answer: fact for answer, fact in relation.bridge.items() if answer not in changed}


def choose_target(
    relation: Relation, subject: str, bridge: dict[str, str], used: Counter[str], rng: random.Random
) -> str:
    """Pick a false answer: one that allows a portability probe if possible, and the least used so far."""
    truth = relation.facts[subject]
    answers = sorted({answer for answer in relation.facts.values() if answer != truth})
    rng.shuffle(answers)
    if truth in bridge:
        hops = [answer for answer in answers if bridge.get(answer, bridge[truth]) != bridge[truth]]
        answers = hops or answers
    return min(answers, key=lambda answer: used[answer])


def locality_of(relation: Relation, position: int, target: str, unrelated: list[str]) -> list[dict[str, str]]:
    """Return one probe on a reserved fact (its answer is not the target) and one on common knowledge."""
    reserved = [subject for subject, answer in relation.reserved.items() if answer != target]
    neighbour = reserved[position % len(reserved)]
    prompt = unrelated[position % len(unrelated)]
    return [
        {
            "prompt": relation.prompt.format(s=neighbour),
            "answer": relation.reserved[neighbour],
            "kind": "same_relation",
        },
        {"prompt": prompt, "answer": UNRELATED[prompt], "kind": "unrelated"},
    ]


def portability_of(relation: Relation, subject: str, target: str, bridge: dict[str, str]) -> list[dict[str, str]]:
    """Return the one-hop probe, or nothing where the hop is missing or would not tell the two facts apart."""
    before, after = bridge.get(relation.facts[subject]), bridge.get(target)
    if before is None or after is None or before == after:
        return []
    return [{"prompt": relation.hop.format(s=subject), "answer": after, "kind": "one_hop"}]


def relation_records(
    relation: Relation, edited: dict[str, set[str]], unrelated: list[str], rng: random.Random
) -> list[Record]:
    """Return all records of one relation in a shuffled, deterministic order (without ids)."""
    subjects = list(relation.facts)
    rng.shuffle(subjects)
    bridge = usable_bridge(relation, edited)
    used: Counter[str] = Counter()
    pool = rng.sample(unrelated, len(unrelated))
    records: list[Record] = []
    for position, subject in enumerate(subjects):
        target = choose_target(relation, subject, bridge, used, rng)
        used[target] += 1
        records.append(
            {
                "relation": relation.name,
                "prompt": relation.prompt.format(s=subject),
                "subject": subject,
                "target_new": target,
                "ground_truth": relation.facts[subject],
                "rephrase": [template.format(s=subject) for template in relation.rephrase],
                "locality": locality_of(relation, position, target, pool),
                "portability": portability_of(relation, subject, target, bridge),
            }
        )
    return records


def build(seed: int = SEED) -> list[Record]:
    """Build every record, interleaved over the relations, with ids in file order."""
    rng = random.Random(seed)
    edited = {relation.name: set(relation.facts) for relation in RELATIONS}
    unrelated = list(UNRELATED)
    columns = [relation_records(relation, edited, unrelated, rng) for relation in RELATIONS]
    rng.shuffle(columns)
    rows = [column[depth] for depth in range(max(map(len, columns))) for column in columns if depth < len(column)]
    return [{"id": f"wf-{number:04d}", **row} for number, row in enumerate(rows, start=1)]


def main() -> None:
    """Write the data set to ``--output``."""
    parser = argparse.ArgumentParser(description="Build the worldfacts data set.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (JSON lines)")
    args = parser.parse_args()
    records = build()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    args.output.write_bytes(text.encode("utf-8"))
    print(f"wrote {len(records)} records to {args.output}")


if __name__ == "__main__":
    main()
