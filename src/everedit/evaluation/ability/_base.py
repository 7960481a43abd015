"""What a task of general ability is: records, what they ask of a model, and how the answers become figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everedit.errors import TokenError
from everedit.evaluation.aggregate import Aggregate, intervals, mean_of, summarised
from everedit.evaluation.read import read
from everedit.models import LanguageModel

__all__ = ["Choice", "Measured", "Outcome", "Record", "Task", "chosen", "macro_f1", "written"]

Record = dict[str, Any]
_ROWS, _TOKENS = 16, 4096


@dataclass(frozen=True)
class Outcome:
    """What came of one record: ``values`` by column, and what was asked and said."""

    values: dict[str, float | None]
    asked: str
    said: str


@dataclass(frozen=True)
class Task:
    """A named, versioned task. ``measure(lm, records)`` gives an outcome for each record, None where it does not fit
    the model's context; ``figures`` are made of the outcomes' ``columns``, the first being the one to show.

    ``file`` is where its records are in a folder of data; ``published`` marks a form that is only there to be compared
    with published numbers, faults included; ``skip`` leaves out the first records, and ``most`` all behind so many.
    """

    name: str
    title: str
    file: str
    measure: Callable[[LanguageModel, Sequence[Record]], list[Outcome | None]]
    columns: tuple[str, ...] = ("accuracy",)
    derived: Mapping[str, Aggregate] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    published: bool = False
    skip: int = 0
    most: int | None = None

    @property
    def figures(self) -> dict[str, Aggregate]:
        """How each figure is made."""
        return {**{name: mean_of(name) for name in self.columns if name not in self.hidden}, **self.derived}

    def measured(self, lm: LanguageModel, records: Sequence[Record], seed: int = 0) -> Measured:
        """Measure a model as it is now on ``records``."""
        outcomes = self.measure(lm, records)
        kept = [outcome for outcome in outcomes if outcome is not None]
        values = [outcome.values for outcome in kept]
        return Measured(
            self.name,
            len(kept),
            len(outcomes) - len(kept),
            summarised(values, self.columns, self.figures),
            intervals(values, self.columns, self.figures, seed=seed),
            kept,
        )


@dataclass(frozen=True)
class Measured:
    """A task's figures with their 95 % bootstrap intervals over ``examples`` records; ``left_out`` were too long."""

    task: str
    examples: int
    left_out: int
    figures: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    outcomes: list[Outcome] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for saving, without the outcomes."""
        pairs = {name: None if pair is None else list(pair) for name, pair in self.intervals.items()}
        return {"examples": self.examples, "left_out": self.left_out, "figures": self.figures, "intervals": pairs}


@dataclass(frozen=True)
class Choice:
    """A prompt and the texts that may follow it, ``right`` the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    right: int


def chosen(lm: LanguageModel, choices: Sequence[Choice]) -> list[Outcome | None]:
    """Return for each choice whether the option with the lowest mean loss per token is the right one.

    The columns are ``accuracy``, and ``gold`` and ``said``, the indices of the right option and of the model's.
    """
    fitting = [choice if _fits(lm, choice) else None for choice in choices]
    pairs = [(choice.prompt, option) for choice in fitting if choice is not None for option in choice.options]
    losses = iter([reading.nll for reading in read(lm, pairs)])
    found: list[Outcome | None] = []
    for choice in fitting:
        if choice is None:
            found.append(None)
            continue
        own = [next(losses) for _ in choice.options]
        said = own.index(min(own))
        values = {"accuracy": float(said == choice.right), "gold": float(choice.right), "said": float(said)}
        found.append(Outcome(dict(values), choice.prompt, choice.options[said]))
    return found


def _fits(lm: LanguageModel, choice: Choice) -> bool:
    try:
        for option in choice.options:
            lm.encode(choice.prompt, option)
    except TokenError:
        return False
    return True


def macro_f1(classes: int) -> Aggregate:
    """Return the mean over the classes of F1 = 2 tp / (2 tp + fp + fn), from columns ``gold`` and ``said``.

    A class that is neither asked for nor said does not count.
    """

    def f1(values: Mapping[str, np.ndarray]) -> np.ndarray:
        gold, said = values["gold"], values["said"]
        scores = []
        for label in range(classes):
            hits = ((gold == label) & (said == label)).sum(1)
            named = (gold == label).sum(1) + (said == label).sum(1)
            scores.append(np.where(named > 0, 2 * hits / np.maximum(named, 1), np.nan))
        return np.asarray(np.nanmean(scores, axis=0))

    return f1


def written(lm: LanguageModel, prompts: Sequence[str], tokens: int, *, one_line: bool = False) -> list[str | None]:
    """Return the greedy text of up to ``tokens`` tokens behind each prompt; None where it has no room.

    With ``one_line`` it is the first line in it that says something. Prompts of like length run together; what is
    written does not depend on the others.
    """
    sizes = {prompt: _size(lm, prompt) for prompt in prompts}
    fitting = sorted((p for p, size in sizes.items() if size + tokens <= lm.context_tokens), key=lambda p: sizes[p])
    texts: dict[str, str] = {}
    while fitting:
        # In order of their length: the last row of a part is its longest.
        count = max(1, min(_ROWS, _TOKENS // (sizes[fitting[min(_ROWS, len(fitting)) - 1]] + tokens)))
        part, fitting = fitting[:count], fitting[count:]
        texts |= dict(zip(part, lm.generate(part, max_new_tokens=tokens), strict=True))
    found = (texts.get(prompt) for prompt in prompts)
    return [text.strip().partition("\n")[0] if one_line and text is not None else text for text in found]


def _size(lm: LanguageModel, prompt: str) -> int:
    try:
        return len(lm.encode(prompt).ids)
    except TokenError:
        return lm.context_tokens + 1
