"""What a run measures of the model as it is: after each edit, and at checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.evaluation import Baseline, EditScores, EndpointJudge, Evaluator, References
from everedit.evaluation.ability import Ability
from everedit.evaluation.evaluate import average
from everedit.evaluation.protocols import Answers
from everedit.experiments.config import RunConfig
from everedit.experiments.summary import checkpoint_scores
from everedit.models import LanguageModel
from everedit.models.memory import peak_memory_mb

__all__ = ["Scoring", "make_evaluator"]


def make_evaluator(lm: LanguageModel, config: RunConfig) -> Evaluator:
    """Return the evaluator that a config describes. Raises :class:`EvereditError` for a protocol that cannot be."""
    judge = EndpointJudge(config.judge) if config.judge else None
    references = References.load(config.references) if config.references else None
    return Evaluator(lm, config.protocols, judge, references, config.seed)


@dataclass
class Scoring:
    """Asks the model that ``editor`` edits what a run wants to know; ``baseline`` is what it said unedited.

    Under ``config.beneath`` all of it is measured twice: with the weights as the policy shows them, and as the stream
    goes on with them.
    """

    config: RunConfig
    editor: Editor
    baseline: Baseline = field(default_factory=Baseline.empty)

    def __post_init__(self) -> None:
        self.evaluator = make_evaluator(self.editor.lm, self.config)
        few = self.config.model_copy(update={"protocols": self.config.right_after})
        self._right_after = make_evaluator(self.editor.lm, few)
        self._ability = Ability(self.config.ability, self.config.seed) if self.config.ability else None

    def right_after(self, edits: Sequence[Edit]) -> list[EditScores]:
        """Return the scores of edits that were just made."""
        return self._right_after.score(edits, self.baseline)

    def right_after_beneath(self, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """Return what the rows of edits that were just made say of the model beneath the policy."""
        if not self.config.beneath:
            return [{} for _ in edits]
        with self.editor.beneath():
            return [{"beneath": {"immediate": item.scores}} for item in self.right_after(edits)]

    def unedited(self, edits: Sequence[Edit]) -> list[EditScores]:
        """Return the unedited model's scores."""
        return self.evaluator.score_baseline(edits, self.baseline)

    def scores(self, edits: Sequence[Edit]) -> list[EditScores]:
        """Return the scores of edits on the model as it is now."""
        return self.evaluator.score(edits, self.baseline)

    def checkpoint(
        self, edits: Sequence[Edit], singly: Sequence[EditScores] = ()
    ) -> tuple[dict[str, Any], list[EditScores], Answers | None]:
        """Return the row of a checkpoint after ``edits``, their scores, and what the model said.

        Edits that were taken back one by one bring the scores that they had then, ``singly``; nothing is asked.
        """
        now = None if singly else self.evaluator.answers(edits, self.baseline)
        scores = list(singly) if now is None else self.evaluator.score_answers(edits, now, self.baseline)
        row = {"kind": "checkpoint", "n": len(edits), **self._measured(edits, scores)}
        row["unedited"] = average(self.unedited(edits))
        if self.config.beneath:
            with self.editor.beneath():
                row["beneath"] = self._measured(edits, self.scores(edits))
        return {**row, "peak_memory_mb": peak_memory_mb()}, scores, now

    def _measured(self, edits: Sequence[Edit], scores: Sequence[EditScores]) -> dict[str, Any]:
        return {
            **checkpoint_scores(edits, scores, self.config.seed, single=self.config.single),
            "norm_ratio": self.editor.norm_ratios(),
            "singular_value_ratio": self.editor.singular_value_ratios(),
            **({"ability": self.abilities()} if self._ability else {}),
        }

    def abilities(self) -> dict[str, Any]:
        """Return what the model can do in general, by task; empty if the run does not ask."""
        return {item.task: item.as_dict() for item in self._ability.measure(self.editor.lm)} if self._ability else {}
