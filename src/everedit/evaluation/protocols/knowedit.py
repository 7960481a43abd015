"""Portability (evaluation.md, part 5): questions whose answer rests on the new fact, by kind, and MQuAKE's multi-hop.

Yao et al., "Editing Large Language Models", EMNLP 2023; Zhang et al. (KnowEdit) 2024; Zhong et al. (MQuAKE) 2023.
An answer that rests on further facts can only be asked of a model that knows these: the figures ``…_known`` count only
probes whose further facts the unedited model says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from everedit.edit import Edit, Probe
from everedit.evaluation.contexts import QUESTION
from everedit.evaluation.metrics import any_match, mean, token_accuracy
from everedit.evaluation.protocols._base import Answers, Asks, Protocol, Scores

__all__ = ["PROTOCOLS"]

KINDS = ("one_hop", "alias", "inverse", "logical", "multi_hop")


def _needs(edit: Edit) -> list[Probe]:
    return [need for probe in edit.portability for need in probe.needs]


def _portability_asks(edit: Edit) -> Asks:
    probes = ((probe.prompt, probe.answer) for probe in (*edit.portability, *_needs(edit)))
    return Asks(read=((edit.prompt, edit.target_new), *probes))


def _portability(edit: Edit, now: Answers, base: Answers) -> Scores:
    def accuracy(answers: Answers, prompt: str, answer: str) -> float:
        reading = answers.readings[prompt, answer]
        return token_accuracy(reading.predicted, reading.target)

    scores = [(probe, accuracy(now, probe.prompt, probe.answer)) for probe in edit.portability]
    known = [
        score for probe, score in scores if _knows(probe, lambda need: accuracy(base, need.prompt, need.answer) == 1.0)
    ]
    return {
        "portability": mean(score for _, score in scores),
        **{kind: mean(score for probe, score in scores if probe.kind == kind) for kind in KINDS},
        "portability_known": mean(known),
        "reliability": accuracy(now, edit.prompt, edit.target_new),
    }


def _knows(probe: Probe, says: Callable[[Probe], bool]) -> bool:
    """Whether a model says every fact that a probe rests on; False where the record does not tell these."""
    return bool(probe.needs) and all(says(need) for need in probe.needs)


def _multi_hop_asks(edit: Edit) -> Asks:
    probes = [probe for probe in edit.portability if probe.kind == "multi_hop"]
    prompts = [edit.prompt, *(item.prompt for probe in probes for item in (probe, *probe.needs))]
    return Asks(open=tuple((QUESTION, prompt) for prompt in prompts))


def _multi_hop(edit: Edit, now: Answers, base: Answers) -> Scores:
    def right(answers: Answers, probe: Probe) -> float:
        return any_match(answers.open[QUESTION, probe.prompt], probe.answers)

    cases: dict[str, list[float]] = defaultdict(list)
    known: dict[str, float] = {}
    for probe in edit.portability:
        if probe.kind == "multi_hop":
            cases[probe.case].append(right(now, probe))
            if _knows(probe, lambda need: right(base, need) == 1.0):
                known[probe.case] = max(cases[probe.case])
    return {
        "multi_hop": mean(max(case) for case in cases.values()),
        "every_question": mean(mean(case) for case in cases.values()),
        "multi_hop_known": mean(known.values()),
        "reliability": any_match(now.open[QUESTION, edit.prompt], edit.targets),
    }


PROTOCOLS = (
    Protocol(
        "knowedit/portability@1",
        "share of the answer's tokens that are the model's first choice, given the tokens before: on questions that "
        "rest on the new fact, all together and by kind; known: where the unedited model says the further facts needed",
        ("portability", *KINDS, "portability_known", "reliability"),
        _portability_asks,
        _portability,
    ),
    Protocol(
        "mquake/multi-hop@1",
        "free text up to its natural stop is one of the right answers: to one of a case's questions at least "
        "(multi_hop), over all questions (every_question), where the unedited model says the facts needed (known)",
        ("multi_hop", "every_question", "multi_hop_known", "reliability"),
        _multi_hop_asks,
        _multi_hop,
    ),
)
