"""What a run measured, as tables, curves and comparisons ask for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from everedit.report.results import Scores, mapping, mean, number
from everedit.report.run_files import Record, RunFiles
from everedit.report.wording import printed

__all__ = ["FIRST", "ROLLBACK", "Cost", "Result", "When", "numbers"]

When = Literal["immediate", "retained", "uncontradicted", "first_100", "final"]
FIRST = 100
"""So many first edits of a stream have scores of their own."""
ROLLBACK = "roll-back@1"
"""What tables call WilKE's protocol, whose scores are in a file of their own."""

_ROLLBACK_METRICS = ("ES", "GS", "LS", "ERS", "ORS", "S")


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds an edit, without scoring, and the most memory its process held."""

    seconds: float | None
    memory_mb: float | None


@dataclass(frozen=True)
class Result:
    """The numbers of one run. ``axes`` are model, data, method, policy and seed as they are called in tables.

    ``single`` tells that every edit was taken back before the next; ``finished`` that the run came to its end. Tasks of
    general ability are protocols whose scores are not of edits.
    """

    folder: Path
    axes: dict[str, str]
    settings: Record
    single: bool = False
    finished: bool = True
    cost: Cost = Cost(None, None)
    growth: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    unedited_ability: Record = field(default_factory=dict, repr=False)
    _files: RunFiles | None = field(default=None, repr=False)
    _rollback: Record = field(default_factory=dict, repr=False)

    @property
    def line(self) -> str:
        """Method and policy, as a table's row is called."""
        method, policy = printed(self.axes["method"]), self.axes["policy"]
        return method if policy == "accumulate" else f"{method} + {printed(policy)}"

    @cached_property
    def protocols(self) -> list[str]:
        """The names of the protocols with scores, those of general ability last."""
        if self._rollback:
            return [ROLLBACK]
        blocks = [mapping(row.get("retained")) for row in self._checkpoints]
        blocks += [mapping(row.get("immediate")) for row in self._edits[:1]]
        return list(dict.fromkeys([*(name for block in blocks for name in block), *self.abilities]))

    @cached_property
    def abilities(self) -> list[str]:
        """The names of the tasks of general ability that were measured at checkpoints."""
        return list(dict.fromkeys(name for row in self._checkpoints for name in mapping(row.get("ability"))))

    @property
    def marks(self) -> list[int]:
        """After how many edits there are scores."""
        if self._rollback:
            return sorted(int(mark) for mark in self._rollback["checkpoints"])
        return [row["n"] for row in self._checkpoints]

    def metrics(self, protocol: str) -> list[str]:
        """Return the metrics of a protocol, those made of the others last."""
        if self._rollback:
            return list(_ROLLBACK_METRICS)
        if protocol in self.abilities:
            return list(dict.fromkeys(name for mark in self.marks for name in self._ability(protocol, mark, "figures")))
        blocks = [mapping(mapping(row.get("retained")).get(protocol)) for row in self._checkpoints]
        blocks += [mapping(mapping(row.get("immediate")).get(protocol)) for row in self._edits[:1]]
        return list(dict.fromkeys(name for block in blocks for name in block))

    def scores(self, protocol: str, mark: int, when: When) -> Scores:
        """Return the figures after ``mark`` edits, by metric; empty where there are none.

        ``immediate`` is right after each edit, ``retained`` with the model after ``mark`` edits, ``uncontradicted`` the
        same without edits that a later one contradicts, ``first_100`` the same of the first hundred alone, ``final`` of
        the first ``mark`` with the last model.
        """
        if self._rollback:
            return numbers(self._rollback["checkpoints"].get(str(mark))) if when == "retained" else {}
        if protocol in self.abilities:
            return numbers(self._ability(protocol, mark, "figures"))
        if when in ("retained", "uncontradicted", "first_100"):
            return numbers(mapping(self._checkpoint(mark).get(when)).get(protocol))
        # A summary has figures that are no means over edits, too.
        summary = mapping(mapping(self._files.summary if self._files else {}).get("protocols"))
        block = mapping(mapping(mapping(mapping(summary.get(protocol)).get("checkpoints")).get(str(mark))).get(when))
        found = {metric: mean(self.by_edit(protocol, metric, mark, when)) for metric in self.metrics(protocol)}
        found.update(numbers(block))
        return found if any(value is not None for value in found.values()) else {}

    def unedited(self, protocol: str, mark: int) -> Scores:
        """Return the unedited model's figures on the first ``mark`` edits, by metric."""
        if protocol in self.abilities:
            return numbers(mapping(mapping(self.unedited_ability.get(protocol)).get("figures")))
        kept = mapping(mapping(self._checkpoint(mark).get("unedited")).get(protocol))
        if kept:
            return numbers(kept)
        blocks = [mapping(mapping(row.get("before")).get(protocol)) for row in self._edits[:mark]]
        return {metric: mean(number(block.get(metric)) for block in blocks) for metric in self.metrics(protocol)}

    def interval(self, protocol: str, metric: str, mark: int) -> tuple[float, float] | None:
        """Return the bootstrap interval of a retained figure as the run wrote it down."""
        kept = mapping(mapping(self._checkpoint(mark).get("intervals")).get(protocol)).get(metric)
        if protocol in self.abilities:
            kept = self._ability(protocol, mark, "intervals").get(metric)
        ends = [number(value) for value in kept] if isinstance(kept, list) else []
        return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None

    def _ability(self, task: str, mark: int, part: str) -> Record:
        return mapping(mapping(mapping(self._checkpoint(mark).get("ability")).get(task)).get(part))

    def _checkpoint(self, mark: int) -> Record:
        return next((row for row in self._checkpoints if row["n"] == mark), {})

    def by_edit(self, protocol: str, metric: str, mark: int, when: When) -> list[float | None]:
        """Return the score of each of the first ``mark`` edits, in order; empty where they were not kept."""
        if when == "immediate":
            blocks = [mapping(mapping(row.get("immediate")).get(protocol)) for row in self._edits[:mark]]
            return [number(block.get(metric)) for block in blocks]
        row = self._checkpoint(self.marks[-1] if when == "final" and self.marks else mark)
        kept = mapping(mapping(row.get("by_edit")).get(protocol)).get(metric) if when != "uncontradicted" else None
        wanted = min(mark, FIRST) if when == "first_100" else mark
        return [number(value) for value in kept[:wanted]] if isinstance(kept, list) and len(kept) >= wanted else []

    def edit_ids(self, mark: int) -> list[str]:
        """Return the ids of the first ``mark`` edits."""
        return [str(row.get("edit_id")) for row in self._edits[:mark]]

    def explanation(self, protocol: str) -> str:
        """Return what the run's configuration says of a protocol."""
        return str(mapping(self._files.config.get("explanations") if self._files else {}).get(protocol) or "")

    @property
    def _edits(self) -> list[Record]:
        return self._files.edits if self._files else []

    @property
    def _checkpoints(self) -> list[Record]:
        return self._files.checkpoints if self._files else []


def numbers(block: object) -> Scores:
    """Return the numbers of a mapping, by name; empty for anything else."""
    return {metric: number(value) for metric, value in mapping(block).items()}
