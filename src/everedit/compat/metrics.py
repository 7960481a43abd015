"""EasyEdit's nested dictionary of metrics, filled by our scorers; every entry says under which protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from everedit.edit import Edit, Probe
from everedit.errors import near_names
from everedit.evaluation.metrics import mean
from everedit.evaluation.protocols import PROTOCOLS, Answers

__all__ = ["PERPLEXITY", "protocol_of", "quality", "read_under", "summary_metrics"]

_TOKENS = "teacher-forced/token-accuracy@1"
PERPLEXITY = "teacher-forced/perplexity@1"
"""exp of the mean loss over the target's tokens, given the tokens before."""

_OURS = (_TOKENS, "teacher-forced/all-tokens@1", "probability-comparison@1", "free-generation/exact-match@1")
# What EasyEdit calls exact match is the share of tokens that are the first choice, under teacher forcing.
_METRICS = {"exact match": _TOKENS, "token em": _TOKENS, "token_em": _TOKENS, "ppl": PERPLEXITY}


def protocol_of(eval_metric: str) -> str:
    """Return the protocol that EasyEdit's ``eval_metric`` stands for, which may be the name of one of ours.

    Raises :class:`everedit.errors.UnknownName` with near names.
    """
    if eval_metric in _OURS:
        return eval_metric
    if eval_metric not in _METRICS:
        raise near_names("eval_metric", eval_metric, [*_METRICS, *_OURS])
    return _METRICS[eval_metric]


def read_under(protocol: str) -> str:
    """Return the protocol whose readings a metric is made from."""
    return _TOKENS if protocol == PERPLEXITY else protocol


def quality(edit: Edit, now: Answers, base: Answers, protocol: str, scored: str) -> dict[str, Any]:
    """Return one edit's metrics: ``rewrite_acc``, ``rephrase_acc``, ``locality`` and ``portability`` by their keys.

    Locality compares with ``base``, the unedited model's answers. ``metric_meta`` names the protocol of each, and what
    was ``scored``: the model before the edits, right after this one, or after all.
    """
    found: dict[str, Any] = {"locality": {}, "portability": {}, "metric_meta": {}}
    score = PROTOCOLS[read_under(protocol)].score
    for section, metric, alone in _parts(edit):
        head, _, key = section.rpartition(".")
        place = found[head] if head else found
        if protocol == PERPLEXITY and not head:
            name, result = PERPLEXITY, f"{key}_ppl"
            losses = [now.readings[(*one.rephrase, one.prompt)[0], one.target_new].nll for one in alone]
            place[result] = math.exp(sum(losses) / len(losses))
        else:
            name, result = read_under(protocol), f"{key}_acc"
            place[result] = [score(one, now, base)[metric] for one in alone]
        about = {"result_key": f"{head}.{result}".lstrip("."), "protocol": name, "comparable_group": name}
        found["metric_meta"][section] = {**about, "scored": scored}
        if head == "locality":
            place |= _said(key, [one.locality[0] for one in alone], now)
            found["metric_meta"][section]["against"] = "unedited model"
    return found


def _parts(edit: Edit) -> Iterator[tuple[str, str, list[Edit]]]:
    """Yield each entry's name, the metric of ours that it is, and the edit with each of its probes alone."""

    def alone(**probes: tuple[Any, ...]) -> Edit:
        return edit.model_copy(update={"rephrase": (), "locality": (), "portability": (), **probes})

    yield "rewrite", "reliability", [alone()]
    if edit.rephrase:
        yield "rephrase", "generalization", [alone(rephrase=(prompt,)) for prompt in edit.rephrase]
    for section in ("locality", "portability"):
        probes: Sequence[Probe] = getattr(edit, section)
        for kind in dict.fromkeys(probe.kind for probe in probes):
            yield f"{section}.{kind}", section, [alone(**{section: (p,)}) for p in probes if p.kind == kind]


def _said(key: str, probes: Sequence[Probe], now: Answers) -> dict[str, list[Any]]:
    """Return what the model says to probes: its first choices token by token, or its own texts, as far as asked for."""
    pairs = [(probe.prompt, probe.answer) for probe in probes]
    found: dict[str, list[Any]] = {}
    if all(pair in now.readings for pair in pairs):
        found[f"{key}_output"] = [list(now.readings[pair].predicted) for pair in pairs]
    if all(pair in now.texts for pair in pairs):
        found[f"{key}_gen_content"] = [now.texts[pair] for pair in pairs]
    return found


def summary_metrics(all_metrics: Sequence[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """Return the mean over edits of every metric, in the same nesting; EasyEdit's prints it, this does not."""
    rows = [all_metrics] if isinstance(all_metrics, dict) else list(all_metrics)
    return {
        phase: _means([row[phase] for row in rows if phase in row])
        for phase in ("pre", "post", "final")
        if any(phase in row for row in rows)
    }


def _means(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if key in part]
        if key in ("locality", "portability"):
            found[key] = _means(values)
        elif key.endswith(("_acc", "_ppl")):
            # Each edit counts once, however many prompts it has.
            found[key] = mean(mean(value) if isinstance(value, list) else value for value in values)
    return found
