"""What a protocol is: what it asks of a model, how one edit is scored, and how the scores of many become a row.

A protocol's version goes up when its numbers would change meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from everedit.edit import Edit
from everedit.evaluation.aggregate import Aggregate, mean_of, summarised
from everedit.evaluation.asked import Pair
from everedit.evaluation.read import Reading
from everedit.evaluation.references import References

__all__ = ["METRICS", "Answers", "Asks", "Protocol", "Scores", "pairs_of"]

METRICS = ("reliability", "generalization", "locality", "portability")
Scores = dict[str, float | None]
Verdict = tuple[str, str, str]
"""What a judge judged: question, answer, text."""


@dataclass(frozen=True)
class Asks:
    """What a protocol needs to hear from a model about one edit.

    ``read``: (prompt, target) with the target given; ``write``: (prompt, target) to be written freely, a few tokens
    longer than the target at most; ``open``: (context, prompt), a free text of up to 50 tokens behind the prompt as a
    context puts it; ``sample``: prompts behind which a text of 100 tokens is drawn; ``judge``: (context, prompt,
    answer) whose free text a judge reads.
    """

    read: tuple[Pair, ...] = ()
    write: tuple[Pair, ...] = ()
    open: tuple[Pair, ...] = ()
    sample: tuple[str, ...] = ()
    judge: tuple[tuple[str, str, str], ...] = ()


@dataclass
class Answers:
    """What one model says: readings and bounded texts by (prompt, target), open ones by (context, prompt), samples by
    prompt, and a judge's verdicts. ``references`` are texts to compare samples with.
    """

    readings: dict[Pair, Reading]
    texts: dict[Pair, str]
    open: dict[Pair, str] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    verdicts: dict[Verdict, bool] = field(default_factory=dict)
    references: References | None = field(default=None, compare=False)

    def joined(self, other: Answers) -> Answers:
        """Return the answers of both; where both have one, the other's."""
        return Answers(
            {**self.readings, **other.readings},
            {**self.texts, **other.texts},
            {**self.open, **other.open},
            {**self.samples, **other.samples},
            {**self.verdicts, **other.verdicts},
            other.references or self.references,
        )


@dataclass(frozen=True)
class Protocol:
    """A way of scoring edits: ``score`` gives each of ``metrics`` for one edit, or None where it has no such probe.

    ``derived`` are further columns of a summary, made of the metrics of many edits; everything else is a mean. The
    first metric is the one to show in one figure. ``context`` is what free texts are written in, where it needs one of
    its own, and ``judged`` says that it cannot do without a judge.
    """

    name: str
    explanation: str
    metrics: tuple[str, ...]
    asks: Callable[[Edit], Asks]
    score: Callable[[Edit, Answers, Answers], Scores]
    derived: Mapping[str, Aggregate] = field(default_factory=dict)
    context: str = ""
    judged: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a summary's figures."""
        return (*self.metrics, *self.derived)

    @property
    def aggregates(self) -> dict[str, Aggregate]:
        """How each figure of a summary is made."""
        return {**{metric: mean_of(metric) for metric in self.metrics}, **self.derived}

    def summary(self, scores: Sequence[Mapping[str, float | None]]) -> Scores:
        """Return the figures of many edits; an edit without a probe does not count there."""
        return summarised(scores, self.metrics, self.aggregates)


def pairs_of(edit: Edit, *, rewrite: bool = True, locality: bool = True, portability: bool = True) -> Iterable[Pair]:
    """Yield the (prompt, answer) of an edit and of its probes, in the order of the edit's fields."""
    if rewrite:
        yield from ((prompt, edit.target_new) for prompt in (edit.prompt, *edit.rephrase))
    yield from ((probe.prompt, probe.answer) for probe in edit.locality if locality)
    yield from ((probe.prompt, probe.answer) for probe in edit.portability if portability)
