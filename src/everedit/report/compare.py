"""Two runs compared over the edits that both made: paired tests, and what the runs differ in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everedit.errors import EvereditError, RunFolderError
from everedit.report.collect import collect, flattened
from everedit.report.run_result import Result, When
from everedit.uncertainty import PairedTest, holm, paired_test

__all__ = ["Compared", "Comparison", "compare"]

Tested = tuple[str, str, PairedTest]


@dataclass(frozen=True)
class Compared:
    """One metric under one protocol: the paired test, and its p adjusted for all tests of the comparison (Holm)."""

    protocol: str
    metric: str
    test: PairedTest
    adjusted: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"protocol": self.protocol, "metric": self.metric, **asdict(self.test), "p_holm": self.adjusted}


@dataclass(frozen=True)
class Comparison:
    """Two runs after ``mark`` edits. ``common`` edits are in both; ``differ`` maps settings to the two values."""

    first: str
    second: str
    mark: int
    when: When
    common: int
    differ: dict[str, tuple[str, str]]
    rows: list[Compared]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "rows": [row.as_dict() for row in self.rows]}


def compare(first: Path, second: Path, *, mark: int | None = None, when: When = "retained") -> Comparison:
    """Return the comparison of two run folders after ``mark`` edits (the last number of edits that both were scored at)
    over the edits that are among the first ``mark`` of both.

    Raises :class:`EvereditError` if a folder holds not one run but none or several, or if they have nothing in common.
    """
    a, b = _only(first), _only(second)
    shared = [each for each in a.marks if each in b.marks]
    if not shared or (mark is not None and mark not in shared):
        listed = ", ".join(map(str, shared)) or "none"
        raise EvereditError(
            what="the two runs have no scores after one and the same number of edits"
            if not shared
            else f"not both runs were scored after {mark} edits",
            where=f"{first} and {second}",
            fix=f"both were scored after: {listed}; give runs with a checkpoint in common (--checkpoints)",
        )
    mark = shared[-1] if mark is None else mark
    places = _places(a, b, mark)
    if not places:
        raise EvereditError(
            what="the two runs have no edit in common",
            where=f"{first} and {second}",
            fix="give runs over the same data",
        )
    tests = list(_tests(a, b, mark, when, places))
    if not tests:
        raise EvereditError(
            what=f"the scores of each edit ({when}) were not kept by both runs, or they share no protocol",
            where=f"{first} and {second}",
            fix="run both with this version, under a protocol in common",
        )
    adjusted = holm([test.p for _, _, test in tests])
    rows = [Compared(*test, p) for test, p in zip(tests, adjusted, strict=True)]
    return Comparison(str(first), str(second), mark, when, len(places), _differences(a, b), rows)


def _only(folder: Path) -> Result:
    found = collect([folder])
    if len(found) > 1:
        raise RunFolderError(
            what=f"this folder holds {len(found)} runs, and one is compared",
            where=str(folder),
            fix=f"give one of them, for instance {found[0].folder}",
        )
    return found[0]


def _places(a: Result, b: Result, mark: int) -> list[tuple[int, int]]:
    """Return where each edit that is among the first ``mark`` of both stands in the one and in the other."""
    theirs = {edit: place for place, edit in enumerate(b.edit_ids(mark))}
    return [(place, theirs[edit]) for place, edit in enumerate(a.edit_ids(mark)) if edit in theirs]


def _tests(a: Result, b: Result, mark: int, when: When, places: list[tuple[int, int]]) -> Iterator[Tested]:
    for protocol in (name for name in a.protocols if name in b.protocols):
        for metric in (name for name in a.metrics(protocol) if name in b.metrics(protocol)):
            ours, theirs = (result.by_edit(protocol, metric, mark, when) for result in (a, b))
            if not ours or not theirs:
                continue
            pairs = [(ours[i], theirs[j]) for i, j in places]
            # An edit without such a probe says nothing about it.
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            if known:
                yield protocol, metric, paired_test([x for x, _ in known], [y for _, y in known])


def _differences(a: Result, b: Result) -> dict[str, tuple[str, str]]:
    ours, theirs = dict(flattened(a.settings)), dict(flattened(b.settings))
    keys = dict.fromkeys([*ours, *theirs])
    return {
        key: (str(ours.get(key, "not set")), str(theirs.get(key, "not set")))
        for key in keys
        if ours.get(key) != theirs.get(key)
    }
