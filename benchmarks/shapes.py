"""The shapes that papers report, held against the numbers of the pages: docs/results/shapes.md.

    python -m benchmarks.shapes [--results docs/results]

What is expected stands in ``benchmarks/shapes.yaml``, in the form of the claims of ``everedit reproduce``; what was
found is read from the CSV files of the pages that it names.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from benchmarks import page_rows
from benchmarks.page_rows import ABILITY, COST, GROWTH, Row
from everedit.experiments.config import read_yaml
from everedit.experiments.recipes.claims import Claim, Line, judged
from everedit.methods import method_names
from everedit.policies import policy_names
from everedit.report.run_result import Result
from everedit.report.tables import UNEDITED
from everedit.report.wording import printed

FILE = Path(__file__).with_suffix(".yaml")
FOREWORD = Path(__file__).with_suffix(".md")
METHODS = {printed(name): name for name in method_names()}
POLICIES = {printed(name): name for name in (*policy_names(), "nas+prune")}


@dataclass(frozen=True)
class Found:
    """What a page's file holds of one line of its tables, to be asked as a run's result is."""

    axes: dict[str, str]
    rows: Sequence[Row]
    without: Sequence[Row]

    @cached_property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(row.protocol for row in self.rows if row.protocol != GROWTH))

    @cached_property
    def marks(self) -> list[int]:
        return sorted({row.T for row in self.rows})

    @cached_property
    def growth(self) -> dict[str, list[tuple[int, float]]]:
        grown: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            if row.protocol == GROWTH:
                grown.setdefault(row.metric, []).append((row.T, row.value))
        return grown

    def metrics(self, protocol: str) -> list[str]:
        return list(dict.fromkeys(row.metric for row in self.rows if row.protocol == protocol))

    def scores(self, protocol: str, mark: int, when: str) -> dict[str, float | None]:
        # Costs and general ability are told for no other time than this.
        own = [row for row in self.rows if (row.protocol, row.T) == (protocol, mark)]
        return {row.metric: row.value for row in own if row.when in (when, ABILITY) or row.protocol == COST}

    def unedited(self, protocol: str, mark: int) -> dict[str, float | None]:
        return {row.metric: row.value for row in self.without if (row.protocol, row.T) == (protocol, mark)}

    def by_edit(self, protocol: str, metric: str, mark: int, when: str) -> list[float | None]:
        """Nothing: a page keeps no edit's own score."""
        return []


def found_in(rows: Sequence[Row]) -> list[Found]:
    """Return the lines of a page's tables, by the names of method and policy; a label of its own stays as it is."""
    places: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        places.setdefault((row.model, row.data), {}).setdefault(row.method, []).append(row)
    found = []
    for (model, data), lines in places.items():
        without = lines.pop(UNEDITED, [])
        for line, own in lines.items():
            method, _, policy = line.partition(" + ")
            axes = {"model": model, "data": data, "method": METHODS.get(method, method)}
            found.append(Found({**axes, "policy": POLICIES.get(policy or "accumulate", policy)}, own, without))
    return found


def lines_of(section: dict[str, Any], results: Path) -> list[Line]:
    """Hold a section's claims against the page that it names."""
    found = cast(list[Result], found_in(page_rows.read(results / f"{section['page']}.csv")))
    return judged([Claim.model_validate(claim) for claim in section["claims"]], (), found, "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    sections = [(section, lines_of(section, options.results)) for section in read_yaml(FILE)["sections"]]
    verdicts = Counter(line.verdict for _, lines in sections for line in lines)
    text = [FOREWORD.read_text(encoding="utf-8").strip(), ""]
    text += [
        f"{sum(verdicts.values())} lines: " + ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common()) + "."
    ]
    for section, lines in sections:
        text += ["", f"## {section['title']}", "", section["source"].strip(), ""]
        text += ["| what | where | expected | found | |", "|---|---|---|---|---|"]
        text += [f"| {ln.says} | {ln.where} | {ln.expected} | {ln.found} | {ln.verdict} |" for ln in lines]
    (options.results / "shapes.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
