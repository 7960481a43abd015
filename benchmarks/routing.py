"""How often a prompt finds its note: the router of Marginalia alone, without any model being edited.

    python -m benchmarks.routing [--data DATA_FOLDER] [--pool NAME FILE] [--allowed A]

Without data: the hard cases of ``tests/data/routing_cases.jsonl``, by kind. With it also, against one book of 1,637
notes (zsre/edit and counterfact/edit): rephrased prompts, which should find their own note or one that says the same,
and prompts about the same subject or the same relation that should find none.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from everedit.data import load_edits
from everedit.edit import Edit, subject_span
from everedit.engine.bench import Workbench
from everedit.engine.router import Address, Router
from everedit.methods.marginalia import Marginalia, MarginaliaConfig

CASES = Path("tests/data/routing_cases.jsonl")
Query = tuple[str, str, int | None]
_WORDS = re.compile(r"\w+")
_FUNCTION_WORDS = frozenset(
    ["the", "of", "is", "are", "was", "were", "s", "a", "an", "in", "to", "by", "what", "which", "who", "name"]
)


def hard_cases(embed, metric, limit: float | None) -> dict[str, tuple[int, int]]:
    """Return (right, all) by kind."""
    found: dict[str, list[bool]] = defaultdict(list)
    for line in CASES.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        addresses = [
            Address((note["subject"], *note.get("aliases", ())) if note["subject"] else (), note["prompt"])
            for note in case["notes"]
        ]
        router = Router(addresses, embed([address.key() for address in addresses]), embed, metric, limit=limit)
        note = router.routes([case["prompt"]])[0].note
        expected = -1 if case["note"] is None else case["note"]
        found[f"{case['kind']} ({'none' if expected < 0 else 'note'})"].append(note == expected)
    return {kind: (sum(right), len(right)) for kind, right in sorted(found.items())}


def queries(data: Path, edits: list[Edit]) -> Iterator[Query]:
    """Yield (kind, prompt, number of the note that it is about) of real prompts."""
    by_prompt = {edit.prompt: number for number, edit in enumerate(edits)}
    for number, edit in enumerate(edits):
        kind = "zsre" if edit.prompt.endswith("?") else "counterfact"
        for prompt in edit.rephrase:
            yield f"{kind} rephrased", prompt, number
        for probe in edit.locality:
            yield f"{kind} locality", probe.prompt, None
    for line in (data / "counterfact_full" / "edit.jsonl").open():
        record = json.loads(line)
        rewrite = record["requested_rewrite"]
        number = by_prompt.get(rewrite["prompt"].replace("{}", rewrite["subject"]))
        if number is None:
            continue
        for kind, expected in (
            ("paraphrase", number),
            ("generation", number),
            ("neighborhood", None),
            ("attribute", None),
        ):
            yield from ((f"counterfact {kind}", prompt, expected) for prompt in record[f"{kind}_prompts"][:4])


def other_relations(data: Path) -> list[tuple[Edit, list[str], list[str]]]:
    """Return KnowEdit's edits with prompts that ask for something else about the same subject, and rephrased ones."""
    found = []
    for name in ("wiki_counterfact", "zsre"):
        for line in list((data / "knowedit" / f"{name}.jsonl").open())[:800]:
            record = json.loads(line)
            probes = [item["prompt"] for item in record["locality"].get("Relation_Specificity", [])]
            if subject_span(record["prompt"], record["subject"]) is None:
                continue
            edit = Edit(prompt=record["prompt"], subject=record["subject"], target_new=record["target_new"])
            rephrased = [record["rephrase_prompt"]] if record.get("rephrase_prompt") else []
            found.append((edit, probes[:4], rephrased))
    return found


def asks_the_same(edit: Edit, probe: str) -> bool:
    """Return whether a probe asks for nothing but what the edit's prompt names: "The mother of X is"."""
    named, asked = (set(_WORDS.findall(text.replace(edit.subject or "", "").lower())) for text in (edit.prompt, probe))
    return bool(asked - _FUNCTION_WORDS) and asked - _FUNCTION_WORDS <= named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--pool", nargs=2, action="append", default=[])
    parser.add_argument("--allowed", type=float, default=0.01)
    parser.add_argument("--limit", type=float)
    options = parser.parse_args()
    method = Marginalia(MarginaliaConfig(pools=tuple(map(tuple, options.pool)), allowed=options.allowed))
    bench = Workbench(None, None, pool=lambda name, path: load_edits(name, path).edits)  # type: ignore[arg-type]
    embed, metric = method._encoder(bench).embed, method._metric(bench)
    print(f"limit {metric.limit:.3f}")
    for kind, (right, all_) in hard_cases(embed, metric, options.limit).items():
        print(f"{kind:45s} {right:4d} of {all_:4d}")
    if options.data:
        edits = [
            edit
            for name in ("zsre", "counterfact")
            for edit in load_edits(name, options.data / name / "edit.jsonl", keep_contradictions=True).edits
        ]
        real(options.data, edits[: options.records], embed, metric, options.limit)
        real_relations(other_relations(options.data), embed, metric, options.limit)


def real(data: Path, edits: list[Edit], embed, metric, limit: float | None) -> None:
    addresses = [Address((edit.subject,) if edit.subject else (), edit.prompt) for edit in edits]
    router = Router(addresses, embed([address.key() for address in addresses]), embed, metric, limit=limit)
    asked = list(queries(data, edits))
    start = time.perf_counter()
    routes = router.routes([prompt for _, prompt, _ in asked])
    seconds = time.perf_counter() - start
    rates: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for (kind, _, expected), route in zip(asked, routes, strict=True):
        if expected is None:
            rates[kind].append((route.note < 0, route.note < 0))
        else:
            rates[kind].append((route.note == expected, route.note >= 0))
    for kind, right in sorted(rates.items()):
        own, some = (sum(column) / len(right) for column in zip(*right, strict=True))
        print(f"{kind:45s} {own:.3f} right, {some:.3f} with any note of the subject, of {len(right)}")
    print(f"{1000 * seconds / len(asked):.2f} ms a prompt")


def real_relations(items, embed, metric, limit: float | None) -> None:
    rates: dict[str, list[bool]] = defaultdict(list)
    for edit, probes, rephrased in items:
        address = Address((edit.subject or "",), edit.prompt)
        router = Router([address], embed([address.key()]), embed, metric, limit=limit)
        same = [probe for probe in probes if asks_the_same(edit, probe)]
        other = [probe for probe in probes if probe not in same]
        for kind, prompts, wanted in (
            ("same subject, other relation", other, False),
            # KnowEdit counts these among the former.
            ("same subject, the edited relation by name", same, True),
            ("same subject, rephrased", rephrased, True),
        ):
            rates[f"knowedit {kind}"] += [(route.note >= 0) == wanted for route in router.routes(prompts)]
    for kind, right in rates.items():
        print(f"{kind:45s} {sum(right) / len(right):.3f} right of {len(right)}")


if __name__ == "__main__":
    main()
