"""An edit's texts as rows of tokens: the prompt behind each prefix, cut where the computation may stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from everedit.edit import Edit
from everedit.errors import EditError
from everedit.models import LanguageModel
from everedit.models.tokens import Encoded

__all__ = ["chunks", "essence_row", "prompt_rows", "subject_of"]


def subject_of(edit: Edit) -> str:
    """Return the edit's subject. Raises :class:`EditError` if it has none."""
    if edit.subject is None:
        raise EditError(
            what="this method locates the fact by its subject, and the edit names none",
            where=edit.prompt,
            fix='add "subject", as it stands in the prompt',
        )
    return edit.subject


def prompt_rows(lm: LanguageModel, edit: Edit, prefixes: Sequence[str], *, target: bool = False) -> list[Encoded]:
    """Return the edit's prompt behind each prefix, with the subject located, and with its target if asked."""
    answer = edit.target_new if target else ""
    subject = subject_of(edit)
    return [lm.encode(edit.prompt, answer, subject=subject, prefix=prefix) for prefix in prefixes]


def essence_row(lm: LanguageModel, edit: Edit) -> Encoded:
    """Return "{subject} is a", whose next-token distribution should stay (ROME, section 3.1)."""
    subject = subject_of(edit)
    return lm.encode(f"{subject} is a", subject=subject)


def chunks(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Yield slices of consecutive items whose summed sizes stay within ``budget`` (at least one item each)."""
    start, held = 0, 0
    for index, size in enumerate(sizes):
        if index > start and held + size > budget:
            yield slice(start, index)
            start, held = index, 0
        held += size
    if start < len(sizes):
        yield slice(start, len(sizes))
