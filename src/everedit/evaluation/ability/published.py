"""PRUNE's four downstream tasks as its code measures them, to be compared with published figures and nothing else.

Ma et al., "Perturbation-Restrained Sequential Model Editing", ICLR 2025 (evaluation.md, part 6). The faults are kept:
the solution stands in the reasoning prompt; a summary loses its last 13 characters; in question answering a flag is
never taken back, and one example may count several times; inference counts valid answers only. Prompts say the same in
words of our own, and run without the padding of the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from everedit.evaluation.ability._base import Outcome, Record, Task, written
from everedit.evaluation.aggregate import mean_of
from everedit.evaluation.metrics import normalise_answer
from everedit.evaluation.texts import rouge
from everedit.models import LanguageModel

__all__ = ["TASKS"]

_CUT = 13


def _reasoning(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    prompts, golds = [], []
    for record in records:
        solution, _, gold = record["answer"].partition("#### ")
        prompts.append(f"Q: {record['question']} A: Step by step: {solution} So the answer as a number is:")
        golds.append(gold)
    texts = written(lm, prompts, 5)
    return [
        None if text is None else Outcome({"accuracy": float(gold in text)}, prompt, text)
        for prompt, gold, text in zip(prompts, golds, texts, strict=True)
    ]


def _summarization(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    prompts = [f"{record['dialogue']}\nTL;DR:" for record in records]
    found: list[Outcome | None] = []
    for record, prompt, text in zip(records, prompts, written(lm, prompts, 25), strict=True):
        if text is None:
            found.append(None)
            continue
        said = text[:-_CUT]
        scores = rouge(said, record["summary"]) if len(said) > 1 else {}
        found.append(Outcome({"rouge": sum(scores.values()) / 3}, prompt, said))
    return found


def _open_qa(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    prompts = [
        f"Use the passage to answer the question. Passage: {record['passage']} Question: {record['question']}. Answer:"
        for record in records
    ]
    found: list[Outcome | None] = []
    texts, flag = written(lm, prompts, 20), False
    for record, prompt, text in zip(records, prompts, texts, strict=True):
        if text is None:
            found.append(None)
            continue
        said = normalise_answer(text.rpartition("Answer:")[2].replace("\n", " "))
        hits, flag = span_hits(said.split(" "), {normalise_answer(answer) for answer in record["answer"]}, flag)
        found.append(Outcome({"exact_match": float(hits)}, prompt, text))
    return found


def span_hits(words: Sequence[str], answers: set[str], flag: bool) -> tuple[int, bool]:
    """Return how often one example is counted, and the flag that the next one starts with.

    A first or last word that is an answer counts once and ends the search. Else every word that is one counts, and the
    first longer span sets the flag; with the flag set, the search ends behind the first word that is none.
    """
    if words[0] in answers or words[-1] in answers:
        return 1, flag
    hits = 0
    for start in range(len(words) - 1):
        if words[start] in answers:
            hits += 1
            continue
        spans = (" ".join(words[start : stop + 1]) for stop in range(start + 1, len(words)))
        if any(span in answers for span in spans):
            hits, flag = hits + 1, True
        if flag:
            break
    return hits, flag


def _nli(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    prompts = [f"{r['sentence1']} entails that {r['sentence2']}. True or False? answer:" for r in records]
    found: list[Outcome | None] = []
    for record, prompt, text in zip(records, prompts, written(lm, prompts, 1), strict=True):
        if text is None:
            found.append(None)
            continue
        true, false = ("true" in text.lower()), ("false" in text.lower())
        hit = float(false if "not_entailment" in str(record["label"]).lower() else true)
        valid = true or false
        found.append(Outcome({"accuracy_of_valid": hit if valid else None, "accuracy": hit}, prompt, text))
    return found


def _share_valid(values: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(1 - np.isnan(values["accuracy_of_valid"]).mean(axis=1))


TASKS = (
    Task(
        "prune/reasoning@1",
        "GSM8K with its solution in the prompt: 5 tokens hold the number",
        "general_ability/gsm8k_test.jsonl",
        _reasoning,
        published=True,
        most=358,
    ),
    Task(
        "prune/summarization@1",
        "SAMSum: 25 tokens less 13 characters, mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L",
        "general_ability/samsum_test.jsonl",
        _summarization,
        columns=("rouge",),
        published=True,
        most=149,
    ),
    Task(
        "prune/open-qa@1",
        "NQ-open with a passage written by a model: spans of 20 tokens that are an answer, counted as published",
        "general_ability/nq_passages.jsonl",
        _open_qa,
        columns=("exact_match",),
        published=True,
        most=261,
    ),
    Task(
        "prune/nli@1",
        "RTE, one token: right among those that hold true or false, and among all",
        "general_ability/rte_train.jsonl",
        _nli,
        columns=("accuracy_of_valid", "accuracy"),
        derived={"valid": _share_valid, "accuracy": mean_of("accuracy")},
        published=True,
        most=299,
    ),
)
