"""Which records of a stream a later one contradicts, also in other words: no editor can keep both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from everedit.edit import Edit

__all__ = ["contradicted_by"]

Key = tuple[str, ...]


def contradicted_by(edits: Sequence[Edit]) -> list[int | None]:
    """Return for each edit the index of the first later one that answers its question otherwise, or None.

    Two edits ask one question if they share a wording (a prompt, a rephrasing or a question), or have one subject and
    one relation, or, where no relation is stated, one subject and one old answer: that is how ZsRE's records ask for
    one fact in other words. Answers are compared without case, and any alias counts.
    """
    later: dict[Key, list[int]] = defaultdict(list)
    said = [{target.casefold() for target in edit.targets} for edit in edits]
    found: list[int | None] = [None] * len(edits)
    for index in range(len(edits) - 1, -1, -1):
        keys = set(_questions(edits[index]))
        against = [other for key in keys for other in later[key] if not said[other] & said[index]]
        found[index] = min(against, default=None)
        for key in keys:
            later[key].append(index)
    return found


def _questions(edit: Edit) -> Iterator[Key]:
    for wording in (edit.prompt, *edit.rephrase, edit.question):
        if wording:
            yield "words", " ".join(wording.casefold().split())
    if edit.subject is not None:
        if edit.relation is not None:
            yield "relation", edit.subject.casefold(), edit.relation
        elif edit.ground_truth is not None:
            yield "truth", edit.subject.casefold(), edit.ground_truth.casefold()
