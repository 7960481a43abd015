"""CounterFact as in ROME and MEMIT (evaluation.md, part 2): two answers compared by probability, and texts written.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022. NLL(s) is the mean over the tokens of s:
ES, PS = [NLL(o*) < NLL(o)] on the edit prompt and its paraphrases, NS = [NLL(o) < NLL(o*)] on prompts about neighbours,
S is their harmonic mean; EM, PM and NM are the same differences of probabilities, P(s) = exp(-NLL(s)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from everedit.edit import Edit, Probe
from everedit.evaluation.aggregate import harmonic_of
from everedit.evaluation.metrics import mean, prefers
from everedit.evaluation.protocols._base import Answers, Asks, Protocol, Scores
from everedit.evaluation.texts import fluency

__all__ = ["PROTOCOLS"]

_NEIGHBOURS = ("neighborhood", "same_relation")


def _neighbours(edit: Edit) -> list[Probe]:
    return [probe for probe in edit.locality if probe.kind in _NEIGHBOURS and probe.answer != edit.target_new]


def _asks(edit: Edit) -> Asks:
    prompts = (edit.prompt, *edit.rephrase) if edit.ground_truth is not None else ()
    answers = (edit.target_new, edit.ground_truth or "")
    read = [(prompt, answer) for prompt in prompts for answer in answers]
    for probe in _neighbours(edit):
        read += [(probe.prompt, probe.answer), (probe.prompt, edit.target_new)]
    return Asks(read=tuple(read))


def _score(edit: Edit, now: Answers, base: Answers) -> Scores:
    old, new = edit.ground_truth or "", edit.target_new

    def nll(prompt: str, answer: str) -> float:
        return now.readings[prompt, answer].nll

    def wins(prompts: Sequence[str]) -> tuple[float | None, float | None]:
        pairs = [(nll(prompt, new), nll(prompt, old)) for prompt in prompts] if old else []
        return mean(prefers(*pair) for pair in pairs), mean(math.exp(-a) - math.exp(-b) for a, b in pairs)

    (es, em), (ps, pm) = wins([edit.prompt]), wins(edit.rephrase)
    kept = [(nll(probe.prompt, probe.answer), nll(probe.prompt, new)) for probe in _neighbours(edit)]
    ns, nm = mean(prefers(*pair) for pair in kept), mean(math.exp(-a) - math.exp(-b) for a, b in kept)
    return {"ES": es, "PS": ps, "NS": ns, "EM": em, "PM": pm, "NM": nm}


def _texts(edit: Edit, now: Answers, base: Answers) -> Scores:
    texts = [f"{prompt}{now.samples[prompt]}" for prompt in edit.generation]
    alike = now.references.consistency(edit, texts) if now.references is not None and texts else None
    return {"fluency": mean(fluency(text) for text in texts), "consistency": alike}


PROTOCOLS = (
    Protocol(
        "rome/counterfact@1",
        "ES, PS: the new answer has a lower mean loss than the old one, on the edit prompt and its paraphrases; NS: "
        "the true answer has, on prompts about neighbours; S: their harmonic mean; EM, PM, NM: by how much",
        ("ES", "PS", "NS", "EM", "PM", "NM"),
        _asks,
        _score,
        derived={"S": harmonic_of("ES", "PS", "NS")},
    ),
    Protocol(
        "rome/generation@1",
        "texts of 100 tokens, sampled from the 5 most probable: fluency is the entropy of their bigrams and trigrams "
        "in bits, consistency their tf-idf cosine with reference texts about things that share the new answer",
        ("fluency", "consistency"),
        lambda edit: Asks(sample=edit.generation),
        _texts,
    ),
)
