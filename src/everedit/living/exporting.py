"""A living model as what the exporters read: the net change of its weights, and the record of every fact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from everedit.errors import LedgerError
from everedit.evaluation import Evaluator
from everedit.export import Exported, FactRecord, Source, difference, export, measured
from everedit.gates import canary
from everedit.ledger.records import CommitRecord
from everedit.living.times import person
from everedit.living.writing import Writer
from everedit.outcome import Commit

if TYPE_CHECKING:
    from everedit.living.model import LivingModel

__all__ = ["adopt", "exported", "source_of"]

# Reading what a model says costs one pass; writing freely as well would cost many.
_PROTOCOLS = ("teacher-forced/all-tokens@1", "probability-comparison@1")


def source_of(living: LivingModel, *, measure: bool = True) -> Source:
    """Return the model as it stands, with who, when and whence of every fact, and what editing has cost."""
    facts = [
        FactRecord(item.edit, item.commit[:12], item.record.by, item.record.at, item.record.source, item.record.until)
        for item in living.ledger.held
    ]
    editor, commits = living.editor, living.number
    if not (measure and facts):
        return Source.of_editor(editor, facts, roundings=max(1, commits))
    whole, editor.evaluator = editor.evaluator, Evaluator(living.lm, _PROTOCOLS)
    try:
        texts = [f"{begin} {end}" for begin, end in canary()]
        facts, damage = measured(editor, facts, texts, "the canary text")
    finally:
        editor.evaluator = whole
    return Source.of_editor(editor, facts, damage=damage, roundings=max(1, commits))


def exported(living: LivingModel, format: str, out: str | Path, *, measure: bool, options: dict[str, Any]) -> Exported:
    """Write the model as it stands in a format that others read."""
    return export(source_of(living, measure=measure), format, out, **options)


def adopt(living: LivingModel, folder: str | Path, source: str, by: str) -> CommitRecord:
    """Take over what a peer's model folder differs in from the base model, as one commit.

    Raises :class:`LedgerError` if edits have been made already: the difference is one from the base model.
    """
    if living.head:
        raise LedgerError(
            what="this living model has edits already, and a peer's model differs from the base by all of its own",
            where=str(living.path),
            fix="import it into a new one: everedit open FOLDER --into NEW",
        )
    writer, start = Writer(living), living.editor.state()
    try:
        change = difference(living.lm, folder)
        living.editor.take(change)
        info = {"by": person(by), "source": source or str(folder), "imported": dict(change.info), "why": "imported"}
        writer.stage_change("import", start, Commit((), change, change.norm(), None, {}), info=info)
    except BaseException:
        writer.abandon()
        raise
    return writer.commit()[0]
