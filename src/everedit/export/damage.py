"""Measure what editing has cost: every fact's scores, and perplexity on ordinary text, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from everedit.editor import Editor
from everedit.evaluation.evaluate import average
from everedit.evaluation.perplexity import perplexity
from everedit.export.source import Damage, FactRecord

__all__ = ["measured"]


def measured(
    editor: Editor, facts: Sequence[FactRecord], texts: Sequence[str] = (), name: str = "a text"
) -> tuple[list[FactRecord], Damage]:
    """Return the facts with their scores in the unedited and in the present model, and the damage over all of them.

    ``texts`` called ``name`` are ordinary text that no edit is about; without any, and on an encoder-decoder,
    perplexity is not measured.
    """
    edits, evaluator, lm = [fact.edit for fact in facts], editor.evaluator, editor.lm
    reads = bool(texts) and lm.layout.is_decoder_only
    with editor.unedited():
        baseline = evaluator.baseline(edits)
        before_text = perplexity(lm, texts) if reads else None
    before, after = evaluator.score_baseline(edits, baseline), evaluator.score(edits, baseline)
    after_text = perplexity(lm, texts) if reads else None
    records = [
        replace(fact, before=old.scores, after=new.scores) for fact, old, new in zip(facts, before, after, strict=True)
    ]
    damage = Damage(
        average(before),
        average(after),
        name if before_text else "",
        before_text.tokens if before_text else 0,
        before_text.value if before_text else None,
        after_text.value if after_text else None,
    )
    return records, damage
