"""The strict protocol: text that the model writes freely, up to its natural stop (evaluation.md, part 9).

Yang et al., "The Mirage of Model Editing", ACL 2025. Greedy text of at most 50 tokens that ends at a full stop, a line
break or the end token, behind the question alone, behind an instruction with question and answer marks, or in the
model's chat form. It is right if it is an answer after SQuAD's normalisation, or if a judge says so. Locality asks for
the unedited model's text, token by token, on up to five probes.
"""

from __future__ import annotations

from collections.abc import Callable

from everedit.edit import Edit
from everedit.evaluation.contexts import CONTEXTS, QUESTION
from everedit.evaluation.metrics import any_match, mean
from everedit.evaluation.protocols._base import Answers, Asks, Protocol, Scores

__all__ = ["PROTOCOLS"]

_LOCALITY = 5
"""Locality probes that are asked of a record at most: what QAEdit has. Full CounterFact has dozens."""

Right = Callable[[Answers, str, tuple[str, ...]], float]


def _prompt(edit: Edit, context: str) -> str:
    """The edit prompt as it is asked: where there is a frame for questions, as a question if the record has one."""
    return edit.prompt if context == QUESTION else edit.question or edit.prompt


def _asked(edit: Edit, context: str) -> list[tuple[str, tuple[str, ...]]]:
    prompts = (_prompt(edit, context), *edit.rephrase)
    probes = [(probe.prompt, probe.answers) for probe in (*edit.portability, *edit.locality[:_LOCALITY])]
    return [*((prompt, edit.targets) for prompt in prompts), *probes]


def _score(edit: Edit, now: Answers, base: Answers, context: str, right: Right) -> Scores:
    return {
        "reliability": right(now, _prompt(edit, context), edit.targets),
        "generalization": mean(right(now, prompt, edit.targets) for prompt in edit.rephrase),
        "locality": mean(
            float(now.open[context, probe.prompt] == base.open[context, probe.prompt])
            for probe in edit.locality[:_LOCALITY]
        ),
        "portability": mean(right(now, probe.prompt, probe.answers) for probe in edit.portability),
    }


def _exact(context: str) -> Protocol:
    def right(now: Answers, prompt: str, answers: tuple[str, ...]) -> float:
        return any_match(now.open[context, prompt], answers)

    return Protocol(
        f"wild/{context}@1",
        f"free text of up to 50 tokens, in the context '{context}', is one of the right answers; locality: it is the "
        "unedited model's text",
        ("reliability", "generalization", "locality", "portability"),
        lambda edit: Asks(open=tuple((context, prompt) for prompt, _ in _asked(edit, context))),
        lambda edit, now, base: _score(edit, now, base, context, right),
        context=context,
    )


def _verdict(now: Answers, prompt: str, answers: tuple[str, ...]) -> float:
    return float(now.verdicts[prompt, answers[0], now.open[QUESTION, prompt]])


PROTOCOLS = (
    *map(_exact, CONTEXTS),
    Protocol(
        "wild/judged@1",
        "free text of up to 50 tokens behind the question alone is right in the eyes of a judge; locality: it is the "
        "unedited model's text",
        ("reliability", "generalization", "locality", "portability"),
        lambda edit: Asks(
            open=tuple((QUESTION, prompt) for prompt, _ in _asked(edit, QUESTION)),
            judge=tuple(
                (QUESTION, prompt, answers[0])
                for prompt, answers in _asked(edit.model_copy(update={"locality": ()}), QUESTION)
            ),
        ),
        lambda edit, now, base: _score(edit, now, base, QUESTION, _verdict),
        context=QUESTION,
        judged=True,
    ),
)
