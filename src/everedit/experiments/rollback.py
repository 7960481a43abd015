"""WilKE's roll-back protocol: facts are edited and edited back by the same editor; what drifts is the editor's harm.

Hu et al., "WilKE: Wise-Layer Knowledge Editor for Lifelong Knowledge Editing", Findings of ACL 2024. T steps are 2T
updates of the weights, none of them undone by copying, after which all facts are nominally as before: retention is
measured against the truth, on the edited facts and on facts that were never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.errors import EditError
from everedit.evaluation.metrics import mean
from everedit.evaluation.read import read
from everedit.experiments.reporter import Reporter, Silent

__all__ = ["Toxicity", "known_facts", "rollback", "toxicity"]

_ZERO = 1e-4
_FLASH = 10.0


@dataclass(frozen=True)
class Toxicity:
    """How updates of a stream grow: ``flashes`` are the steps (from 1) at which one was many times the median of those
    before it, ``buildup`` the ratio of the median size of the last tenth to that of the first.
    """

    flashes: tuple[int, ...]
    buildup: float


def toxicity(sizes: Sequence[float], factor: float = _FLASH) -> Toxicity:
    """Return the toxicity of updates with these relative sizes, in order (at least one)."""
    flashes = [step + 1 for step in range(1, len(sizes)) if sizes[step] > factor * median(sizes[:step])]
    tenth = max(1, len(sizes) // 10)
    first = median(sizes[:tenth])
    return Toxicity(tuple(flashes), median(sizes[-tenth:]) / first if first else 1.0)


def known_facts(editor: Editor, edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits whose true answer the unedited model says, token by token: the protocol's material."""
    candidates = [edit for edit in edits if edit.ground_truth is not None]
    with editor.unedited() as lm:
        found = read(lm, [(edit.prompt, str(edit.ground_truth)) for edit in candidates])
    return [edit for edit, said in zip(candidates, found, strict=True) if said.predicted == said.target]


def rollback(
    editor: Editor,
    edits: Sequence[Edit],
    untouched: Sequence[Edit],
    marks: Sequence[int] = (),
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Edit and edit back every one of ``edits`` and return, at each mark T and at the end, ES, GS, LS, ERS, ORS and S.

    ES and GS are the shares of edit prompts and rephrasings answered with the new target right after each edit, LS that
    of locality prompts answered with their own answer; ERS and ORS, at the mark, the shares of edited and untouched
    facts answered with the truth; all by greedy match of every target token. S is their harmonic mean, a zero counting
    as 0.0001. The editor keeps what the stream made of it.

    Raises :class:`EditError` for no edits, or for one without a true answer, before anything is edited.
    """
    reporter = reporter or Silent()
    if not edits:
        raise EditError(what="there is no fact to edit and to edit back", fix="give at least one that the model knows")
    for edit in edits:
        if edit.ground_truth is None:
            raise EditError(
                what="an edit without a true answer cannot be edited back", where=edit.prompt, fix='add "ground_truth"'
            )
    ends = sorted({mark for mark in marks if 0 < mark < len(edits)} | {len(edits)})
    scores: dict[str, list[float | None]] = {"ES": [], "GS": [], "LS": []}
    sizes: list[float] = []
    checkpoints: dict[str, dict[str, float | None]] = {}
    reporter.stage("editing and editing back", len(edits))
    for step, edit in enumerate(edits, start=1):
        [commit] = editor.edit(edit, score=False).commits
        sizes.append(commit.norm)
        scores["ES"].append(_said(editor, [(edit.prompt, edit.target_new)]))
        scores["GS"].append(_said(editor, [(prompt, edit.target_new) for prompt in edit.rephrase]))
        scores["LS"].append(_said(editor, [(probe.prompt, probe.answer) for probe in edit.locality]))
        back = edit.model_copy(update={"target_new": edit.ground_truth, "ground_truth": edit.target_new})
        with editor.using(editor.method.going_back(commit.patch)):
            sizes.append(editor.edit(back, score=False).norm)
        if step in ends:
            checkpoints[str(step)] = _checkpoint(editor, scores, edits[:step], untouched)
        reporter.step(step)
    found = toxicity(sizes)
    return {"checkpoints": checkpoints, "sizes": sizes, "flashes": list(found.flashes), "buildup": found.buildup}


def _checkpoint(
    editor: Editor, scores: dict[str, list[float | None]], edited: Sequence[Edit], untouched: Sequence[Edit]
) -> dict[str, float | None]:
    row = {name: mean(values) for name, values in scores.items()}
    row["ERS"] = _said(editor, [(edit.prompt, str(edit.ground_truth)) for edit in edited])
    row["ORS"] = _said(editor, [(edit.prompt, str(edit.ground_truth)) for edit in untouched])
    parts = [max(value, _ZERO) for value in row.values() if value is not None]
    row["S"] = len(parts) / sum(1 / part for part in parts)
    return row


def _said(editor: Editor, pairs: Sequence[tuple[str, str]]) -> float | None:
    """Return the share of pairs whose every target token is the model's first choice; None for no pairs."""
    return mean(float(said.predicted == said.target) for said in read(editor.lm, pairs))
