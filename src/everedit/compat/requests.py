"""Edits from the lists that EasyEdit's ``edit`` takes, and from request dictionaries of EasyEdit, ROME and MEMIT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from everedit.data.sets import counterfact_full
from everedit.edit import Edit
from everedit.errors import EditError

__all__ = ["as_request", "edit_of", "edits_from_lists", "edits_from_requests"]

Column = Sequence[Any] | str | None


def edits_from_lists(
    prompts: Column,
    target_new: Column,
    ground_truth: Column = None,
    *,
    subject: Column = None,
    rephrase_prompts: Column = None,
    locality_inputs: Mapping[str, Mapping[str, Column]] | None = None,
    portability_inputs: Mapping[str, Mapping[str, Column]] | None = None,
) -> list[Edit]:
    """Return an edit for each prompt; a text stands for a list of one, and a missing list for none of that kind.

    A probe's prompt may be a list of several, with as many answers. Raises :class:`EditError` that names the argument
    which is missing, has another length, or does not fit.
    """
    first = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not first:
        raise EditError(what="there is no prompt to edit", where="prompts", fix="give a text or a list of texts")
    n = len(first)
    if target_new is None:
        raise EditError(what="there is nothing to edit to", where="target_new", fix=f"give {n} texts")
    columns = {
        "target_new": _column("target_new", target_new, n),
        "ground_truth": _column("ground_truth", ground_truth, n),
        "subject": _column("subject", subject, n),
        "rephrase": [_several(value) for value in _column("rephrase_prompts", rephrase_prompts, n)],
        "locality": _probes("locality_inputs", locality_inputs, n),
        "portability": _probes("portability_inputs", portability_inputs, n),
    }
    rows = [{name: column[index] for name, column in columns.items()} for index in range(n)]
    return [
        Edit.parse({"prompt": prompt, **row}, where=f"prompts[{index}]")
        for index, (prompt, row) in enumerate(zip(first, rows, strict=True))
    ]


def edits_from_requests(requests: Iterable[Mapping[str, Any]]) -> list[Edit]:
    """Return the edits of request dictionaries: EasyEdit's, ROME's and MEMIT's, or whole CounterFact records.

    Raises :class:`EditError` that names the request and what it lacks.
    """
    return [edit_of(request, f"requests[{index}]") for index, request in enumerate(requests)]


def edit_of(request: Mapping[str, Any], where: str) -> Edit:
    """Return the edit of one request dictionary, or of a record of EasyEdit's data sets.

    Raises :class:`EditError` that says ``where`` and what it lacks.
    """
    if "requested_rewrite" in request:
        return Edit.parse(_romes(request, where), where=where)
    if isinstance(request.get("target_new"), Mapping):
        return Edit.parse(_romes({"requested_rewrite": request}, where), where=where)
    known = ("prompt", "target_new", "ground_truth", "subject")
    fields = {key: request[key] for key in known if request.get(key) is not None}
    fields["rephrase"] = _several(request.get("rephrase_prompt"))
    for section in ("locality", "portability"):
        inputs = dict(request.get(section) or {})
        if request.get(f"{section}_prompt"):
            inputs[section] = {kind: request.get(f"{section}_{kind}") for kind in ("prompt", "ground_truth")}
        listed = {
            key: {kind: [probe.get(kind)] for kind in ("prompt", "ground_truth")} for key, probe in inputs.items()
        }
        fields[section] = _probes(f"{where}['{section}']", listed, 1)[0]
    return Edit.parse(fields, where=where)


def as_request(edit: Edit) -> dict[str, Any]:
    """Return an edit as EasyEdit's request dictionary."""
    request: dict[str, Any] = {
        "prompt": edit.prompt, "target_new": edit.target_new, "ground_truth": edit.ground_truth,
    }  # fmt: skip
    if edit.subject is not None:
        request["subject"] = edit.subject
    if edit.rephrase:
        request["rephrase_prompt"] = edit.rephrase[0] if len(edit.rephrase) == 1 else list(edit.rephrase)
    for section in ("locality", "portability"):
        request[section] = {}
        for probe in getattr(edit, section):
            named = request[section].setdefault(probe.kind, {"prompt": [], "ground_truth": []})
            named["prompt"].append(probe.prompt)
            named["ground_truth"].append(probe.answer)
    return request


def _column(name: str, values: Column, n: int) -> Sequence[Any]:
    if values is None:
        return [None] * n
    column = [values] if isinstance(values, str) else list(values)
    if len(column) != n:
        raise EditError(
            what=f"{name} has {len(column)} entries and prompts has {n}",
            where=name,
            fix=f"give {n}, one for each prompt, with None where there is none",
        )
    return column


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _probes(name: str, inputs: Mapping[str, Mapping[str, Column]] | None, n: int) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    for key, columns in (inputs or {}).items():
        where = f"{name}['{key}']"
        if not isinstance(columns, Mapping) or {"prompt", "ground_truth"} - set(columns):
            raise EditError(
                what=f"{where} needs prompt and ground_truth",
                where=where,
                fix=f'give {{"prompt": [{n} texts], "ground_truth": [{n} texts]}}',
            )
        prompts = _column(f"{where}['prompt']", columns["prompt"], n)
        answers = _column(f"{where}['ground_truth']", columns["ground_truth"], n)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            # To one prompt, several answers are all right, and the first is scored.
            asked, given = _several(prompt), [answer] if isinstance(prompt, str) else _several(answer)
            if len(asked) != len(given) and prompt is not None:
                raise EditError(
                    what=f"entry {index} has {len(asked)} prompts and {len(given)} answers",
                    where=where,
                    fix="give each prompt its ground_truth",
                )
            found[index] += [
                {"prompt": one, "answer": next(iter(_several(right)), ""), "kind": key}
                for one, right in zip(asked, given, strict=False)
            ]
    return found


def _romes(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of an edit in the form of ROME's CounterFact."""
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping) or "{}" not in str(rewrite.get("prompt", "")):
        raise EditError(
            what="the request's prompt has no place for its subject",
            where=where,
            fix='write {} where the subject stands: {"prompt": "The mother tongue of {} is", "subject": …}',
        )
    try:
        return counterfact_full.convert(dict(record))
    except (KeyError, TypeError) as error:
        raise EditError(
            what=f"the request lacks {error}",
            where=where,
            fix='give {"prompt": "… {} …", "subject": "…", "target_new": {"str": "…"}}',
        ) from error
