"""What a paper claims and what a sweep found: each claim is a line of expected, found, and a verdict."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from everedit.report.results import mean
from everedit.report.run_result import Result, When
from everedit.report.wording import printed
from everedit.uncertainty import bootstrap_interval

__all__ = ["Claim", "Line", "Published", "Spot", "Verdict", "judged"]

UNEDITED = "unedited"
Form = Literal["full", "small"]
Verdict = Literal["as expected", "not as expected", "not measured", "another model"]

_GROWTH = ("norm_ratio", "singular_value_ratio")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spot(_Strict):
    """Which number is meant. A model or data set that is not named is any of the sweep's: the claim is about each.

    ``method`` may be ``unedited``; ``at`` is T, or the first or last that was measured; ``metric`` is one of the
    protocol's, or ``norm_ratio`` or ``singular_value_ratio``, the growth of the matrix that grew most.
    """

    method: str
    policy: str = "accumulate"
    metric: str
    protocol: str = ""
    model: str = ""
    data: str = ""
    at: int | Literal["first", "last"] = "last"
    when: When = "retained"

    def called(self) -> str:
        """What a line calls it."""
        alone = "the unedited model" if self.method == UNEDITED else printed(self.method)
        name = alone if self.policy == "accumulate" else f"{alone} + {printed(self.policy)}"
        at = f"T={self.at}" if isinstance(self.at, int) else {"first": "the start", "last": "the end"}[self.at]
        return f"{name}, {self.metric.replace('_', ' ')} at {at}"


class Claim(_Strict):
    """One number is above or below another, or a bound, by at least ``by``. ``small`` says what is otherwise there."""

    says: str
    of: Spot
    above: float | Spot | None = None
    below: float | Spot | None = None
    by: float = 0.0
    small: dict[str, Any] = {}
    forms: tuple[Form, ...] = ("full", "small")

    @model_validator(mode="after")
    def _one_bound(self) -> Claim:
        if (self.above is None) == (self.below is None):
            raise ValueError("a claim is above or below something")
        return self

    def in_form(self, form: Form) -> Claim:
        """Return the claim as it is meant in a form."""
        if form == "full" or not self.small:
            return self
        return Claim.model_validate({**self.model_dump(exclude={"small"}), **self.small})


class Row(_Strict):
    """One line of a published table: the numbers by T, in the order of the table's metrics."""

    method: str
    policy: str = "accumulate"
    at: dict[int | Literal["last"], tuple[float | None, ...]]


class Published(_Strict):
    """A published table. A found number agrees if it is ``within`` so much of the printed one."""

    table: str
    model: str
    data: str
    protocol: str
    metrics: tuple[str, ...]
    within: float = Field(gt=0)
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _a_number_for_each_metric(self) -> Published:
        for row in self.rows:
            for mark, values in row.at.items():
                if len(values) != len(self.metrics):
                    raise ValueError(f"{row.method} at T={mark}: {len(values)} numbers for {len(self.metrics)} metrics")
        return self


@dataclass(frozen=True)
class Line:
    """One line of expected against found."""

    says: str
    where: str
    expected: str
    found: str
    verdict: Verdict

    def as_dict(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)


def judged(claims: Sequence[Claim], tables: Sequence[Published], results: Sequence[Result], form: Form) -> list[Line]:
    """Return the lines of a recipe: its claims about every model and data set of the results, then published numbers.

    In the small form a published number is of another model: it is shown beside what was found, without a verdict.
    """
    lines = [line for claim in claims if form in claim.forms for line in _claimed(claim.in_form(form), results)]
    return lines + [line for table in tables for line in _printed(table, results, form)]


def _claimed(claim: Claim, results: Sequence[Result]) -> Iterator[Line]:
    bound = claim.above if claim.above is not None else claim.below
    for where, group in _places(results, claim.of):
        found = _value(claim.of, group)
        limit = _value(bound, group).value if isinstance(bound, Spot) else bound
        verdict: Verdict = "not measured"
        if found.value is not None and limit is not None:
            ahead = found.value - limit if claim.above is not None else limit - found.value
            # Rounding must not decide over a margin that is met exactly.
            verdict = "as expected" if ahead > claim.by - (1e-9 if claim.by else 0.0) else "not as expected"
        yield Line(claim.says, where, _bound(claim, bound, limit), f"{found} ({claim.of.called()})", verdict)


def _bound(claim: Claim, bound: float | Spot | None, limit: float | None) -> str:
    """Say what is expected: above or below a bound, by a margin or by no more than one."""
    side, other = ("above", "below") if claim.above is not None else ("below", "above")
    said = "what was not measured" if limit is None else _number(limit)
    name = f" ({bound.called()})" if isinstance(bound, Spot) else ""
    if claim.by < 0:
        return f"no more than {-claim.by:g} {other} {said}{name}"
    return f"{side} {said}{name}" + (f" by {claim.by:g}" if claim.by else "")


def _printed(table: Published, results: Sequence[Result], form: Form) -> Iterator[Line]:
    for row in table.rows:
        for mark, metric, value in (
            (mark, metric, value)
            for mark, values in row.at.items()
            for metric, value in zip(table.metrics, values, strict=True)
            if value is not None
        ):
            model = table.model if form == "full" else ""
            spot = Spot(
                method=row.method, policy=row.policy, metric=metric, protocol=table.protocol, model=model,
                data=table.data, at=mark,
            )  # fmt: skip
            for where, group in _places(results, spot):
                found = _value(spot, group)
                verdict: Verdict = "not measured" if found.value is None else "another model"
                if found.value is not None and form == "full":
                    verdict = "as expected" if abs(found.value - value) <= table.within else "not as expected"
                if form == "small" and found.value is None:
                    continue
                expected = (
                    f"{_number(value)} ± {table.within:g}" if form == "full" else f"{_number(value)} ({table.model})"
                )
                yield Line(f"{table.table}: {spot.called()}", where, expected, str(found), verdict)


@dataclass(frozen=True)
class _Found:
    value: float | None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        ends = f" [{_number(self.interval[0])}, {_number(self.interval[1])}]" if self.interval else ""
        return _number(self.value) + ends


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _places(results: Sequence[Result], spot: Spot) -> Iterator[tuple[str, list[Result]]]:
    """Yield the results of each model and data set that a claim is about; one empty group if there is none."""
    models, data = (list(dict.fromkeys(result.axes[axis] for result in results)) for axis in ("model", "data"))
    found = False
    for model, dataset in itertools.product(models, data):
        if spot.model in ("", model) and spot.data in ("", dataset):
            group = [r for r in results if (r.axes["model"], r.axes["data"]) == (model, dataset)]
            if group:
                found = True
                yield f"{Path(model).name}, {dataset}", group
    if not found:
        yield ", ".join(name for name in (spot.model, spot.data) if name) or "nowhere", []


def _value(spot: Spot, group: Sequence[Result]) -> _Found:
    """Return the number of a spot in the results of one model on one data set: the mean over seeds."""
    own = (spot.method, spot.policy)
    runs = [run for run in group if spot.method == UNEDITED or (run.axes["method"], run.axes["policy"]) == own]
    marks = sorted({mark for run in runs for mark in run.marks})
    if not marks:
        return _Found(None)
    mark = spot.at if isinstance(spot.at, int) else marks[0 if spot.at == "first" else -1]
    there = [run for run in runs if mark in run.marks]
    if spot.metric in _GROWTH:
        return _Found(mean(dict(run.growth.get(spot.metric, [])).get(mark) for run in there))
    protocol = spot.protocol or _first_with(spot.metric, there)
    if spot.method == UNEDITED:
        return _Found(mean(run.unedited(protocol, mark).get(spot.metric) for run in there if protocol in run.protocols))
    value = mean(run.scores(protocol, mark, spot.when).get(spot.metric) for run in there if protocol in run.protocols)
    samples = [[v for v in run.by_edit(protocol, spot.metric, mark, spot.when) if v is not None] for run in there]
    several = bool(samples) and min(map(len, samples)) > 1
    return _Found(value, bootstrap_interval(samples) if several and value is not None else None)


def _first_with(metric: str, runs: Sequence[Result]) -> str:
    names = (name for run in runs for name in run.protocols if metric in run.metrics(name))
    return next(names, "")
