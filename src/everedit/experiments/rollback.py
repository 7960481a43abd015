"""WilKE's roll-back protocol: facts are edited and edited back by the same editor; what drifts is the editor's harm.

Hu et al., "WilKE: Wise-Layer Knowledge Editor for Lifelong Knowledge Editing", Findings of ACL 2024. T steps are 2T
updates of the weights, none of them undone by copying, after which all facts are nominally as before: retention is
measured against the truth, on the edited facts and on facts that were never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from everedit.cache import require_writable, write_json
from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.errors import EditError, EvereditError
from everedit.evaluation.metrics import mean
from everedit.evaluation.read import read
from everedit.experiments.config import RunConfig
from everedit.experiments.run import make_editor
from everedit.methods import method_class
from everedit.models import load_model
from everedit.reporting import Reporter, Silent

__all__ = ["Toxicity", "known_facts", "rollback", "rollback_run", "toxicity"]

_FACTS_AT_ONCE = 64
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


def rollback_run(config: RunConfig, untouched: int, out: Path, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run the protocol on facts of a data set that the model knows, and write ``rollback.json`` into ``out``.

    The first ``config.edits`` of them that the method can edit are edited, the next ``untouched`` are only asked for.

    Raises :class:`EvereditError` before the first edit if the data hold too few.
    """
    reporter = reporter or Silent()
    # A misspelt name should not cost the loading of a model.
    method_class(config.method)
    _require_its_keys(config)
    loaded = load_edits(config.data, config.data_path, keep_contradictions=config.contradictions == "keep")
    require_writable(out, "rollback.json")
    reporter.stage(f"loading {config.model}")
    editor = make_editor(load_model(config.model, device=config.device, dtype=config.dtype), config)
    wanted = config.edits + untouched
    reporter.stage("looking for facts that the model knows", wanted)
    facts: list[Edit] = []
    for start in range(0, len(loaded.edits), _FACTS_AT_ONCE):
        part = loaded.edits[start : start + _FACTS_AT_ONCE]
        facts += known_facts(editor, [edit for edit in part if _fits(editor, edit)])
        reporter.step(min(len(facts), wanted))
        if len(facts) >= wanted:
            break
    if len(facts) < wanted:
        raise EditError(
            what=f"the model knows {len(facts)} of these facts, and {wanted} are asked for",
            where=str(config.data_path or config.data),
            fix="ask for fewer edits or fewer untouched facts, or give other data",
        )
    edited, others = facts[: config.edits], facts[config.edits : wanted]
    result = rollback(editor, edited, others, config.checkpoints, reporter)
    described = {"edited": [edit.id for edit in edited], "untouched": [edit.id for edit in others]}
    result = {"config": config.model_dump(mode="json"), "facts": described, **result}
    write_json(out / "rollback.json", result)
    return result


def _require_its_keys(config: RunConfig) -> None:
    for key in ("batch", "single", "shuffle", "beneath"):
        if getattr(config, key) != RunConfig.model_fields[key].default:
            raise EditError(
                what=f"the roll-back protocol has no {key}: it edits one fact and edits it back, in the data's order",
                where=f"{key}={getattr(config, key)}",
                fix="leave it out",
            )


def _fits(editor: Editor, edit: Edit) -> bool:
    """Whether an edit can be made and scored, and changes what is true."""
    if edit.ground_truth is None or edit.ground_truth.strip() == edit.target_new.strip():
        return False
    try:
        editor.check(edit)
        editor.evaluator.check(edit)
    except EvereditError:
        return False
    return True
