"""The tasks on local files, in clean versions: every record counts, and nothing of an answer stands in its prompt.

Four are the downstream tasks of PRUNE (Ma et al., ICLR 2025): reasoning, summarization, open question answering and
inference. The others are those that AlphaEdit and its relatives watch, with the first rows as examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from everedit.edit import clean_text
from everedit.evaluation.ability._base import Choice, Outcome, Record, Task, chosen, macro_f1, written
from everedit.evaluation.metrics import any_match, normalise_answer
from everedit.evaluation.texts import rouge
from everedit.models import LanguageModel

__all__ = ["TASKS"]

Measure = Callable[[LanguageModel, Sequence[Record]], "list[Outcome | None]"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_EXAMPLES, _SHOTS = 10, 4
_REASONING, _SUMMARY, _ANSWER = 256, 64, 20


def last_number(text: str) -> float | None:
    """Return the last number in a text, thousands' commas left out; None if there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _reasoning(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    prompts = [f"Question: {record['question']}\nAnswer: Let's think step by step." for record in records]

    def outcome(record: Record, prompt: str, text: str) -> Outcome:
        # What the model asks itself afterwards is no part of its answer.
        said, gold = last_number(text.partition("\nQuestion:")[0]), last_number(record["answer"].rpartition("####")[2])
        return Outcome({"accuracy": float(said is not None and said == gold)}, prompt, text)

    return _outcomes(records, prompts, written(lm, prompts, _REASONING), outcome)


def _summarization(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    prompts = [f"{clean_text(record['dialogue'])}\n\nTL;DR:" for record in records]

    def outcome(record: Record, prompt: str, text: str) -> Outcome:
        scores = rouge(text, record["summary"])
        return Outcome({"rouge": sum(scores.values()) / 3, **scores}, prompt, text)

    return _outcomes(records, prompts, written(lm, prompts, _SUMMARY, one_line=True), outcome)


def _open_qa(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    prompts = [f"Question: {record['question'].rstrip('? ')}?\nAnswer:" for record in records]

    def outcome(record: Record, prompt: str, text: str) -> Outcome:
        said = f" {normalise_answer(text)} "
        named = any(f" {normalise_answer(answer)} " in said for answer in record["answer"])
        return Outcome({"exact_match": any_match(text, record["answer"]), "contains": float(named)}, prompt, text)

    return _outcomes(records, prompts, written(lm, prompts, _ANSWER, one_line=True), outcome)


def _outcomes(
    records: Sequence[Record],
    prompts: Sequence[str],
    texts: Sequence[str | None],
    outcome: Callable[[Record, str, str], Outcome],
) -> list[Outcome | None]:
    rows = zip(records, prompts, texts, strict=True)
    return [None if text is None else outcome(record, prompt, text) for record, prompt, text in rows]


def _choosing(question: Callable[[Record], Choice]) -> Measure:
    return lambda lm, records: chosen(lm, [question(record) for record in records])


def _with_examples(question: Callable[[Record], Choice]) -> Measure:
    """Put the first records, which are not asked about themselves, before each prompt with their right answers."""

    def measure(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
        shots = [question(record) for record in records[:_SHOTS]]
        before = "".join(f"{shot.prompt} {shot.options[shot.right]}\n\n" for shot in shots)
        asked = [question(record) for record in records[_EXAMPLES:]]
        return chosen(lm, [Choice(before + choice.prompt, choice.options, choice.right) for choice in asked])

    return measure


def _nli(record: Record) -> Choice:
    prompt = f"{record['sentence1']}\nQuestion: {record['sentence2']} True or False?\nAnswer:"
    return Choice(prompt, ("True", "False"), int(record["label"] in (1, "not_entailment")))


def _sentiment(record: Record) -> Choice:
    # The label is a number in one file and a text in the other.
    prompt = f"Review: {clean_text(record['sentence'])}\nSentiment:"
    return Choice(prompt, ("negative", "positive"), int(record["label"]))


def _acceptability(record: Record) -> Choice:
    return Choice(f"Sentence: {record['sentence']}\nIs it good English?", ("No", "Yes"), int(record["label"]))


def _paraphrase(record: Record) -> Choice:
    prompt = f"First: {record['sentence1']}\nSecond: {record['sentence2']}\nDo both say the same?"
    return Choice(prompt, ("No", "Yes"), int(record["label"]))


def _subjects(record: Record) -> Choice:
    letters = ("A", "B", "C", "D")
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, record["choices"], strict=True))
    return Choice(f"Question: {record['question']}\n{options}\nAnswer:", letters, int(record["answer"]))


def _dialogue(record: Record) -> Choice:
    return Choice(clean_text(record["article"]), tuple(record["options"]), "ABCD".index(record["answers"]))


def _commonsense(record: Record) -> Choice:
    return Choice(f"Goal: {record['goal']}\nHow:", (record["sol1"], record["sol2"]), int(record["label"]))


def _choices(
    name: str, title: str, question: Callable[[Record], Choice], file: str = "", classes: int = 2, shots: bool = False
) -> Task:
    return Task(
        f"{name}@1",
        title,
        f"general_ability/{file or name}.jsonl",
        (_with_examples if shots else _choosing)(question),
        columns=("accuracy", "gold", "said"),
        derived={"f1": macro_f1(classes)},
        hidden=("gold", "said"),
        skip=_EXAMPLES if shots else 0,
    )


TASKS = (
    Task(
        "reasoning@1",
        f"GSM8K: up to {_REASONING} tokens step by step; the last number is the right one",
        "general_ability/gsm8k_test.jsonl",
        _reasoning,
    ),
    Task(
        "summarization@1",
        f"SAMSum: one line of up to {_SUMMARY} tokens; mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L",
        "general_ability/samsum_test.jsonl",
        _summarization,
        columns=("rouge", "rouge1", "rouge2", "rougeL"),
    ),
    Task(
        "open-qa@1",
        f"NQ-open without a passage: one line of up to {_ANSWER} tokens is, or contains, one of the answers",
        "general_ability/nq_open.jsonl",
        _open_qa,
        columns=("exact_match", "contains"),
    ),
    _choices("nli", "RTE, training rows: which of True and False is likelier", _nli, "rte_train"),
    _choices("sst2", "SST-2, 4 examples: negative or positive", _sentiment, shots=True),
    _choices("mrpc", "MRPC, 4 examples: do two sentences say the same", _paraphrase, shots=True),
    _choices("cola", "CoLA, 4 examples: is a sentence good English", _acceptability, shots=True),
    _choices("rte", "RTE, 4 examples: True or False", _nli, shots=True),
    _choices("mmlu", "MMLU, 4 examples: which letter", _subjects, classes=4, shots=True),
    _choices("sentiment", "SST-2, all of its validation set: negative or positive", _sentiment, "sentiment_analysis"),
    _choices("dialogue", "MuTual: which of four replies is likeliest, per token", _dialogue, classes=4),
    _choices("piqa", "PIQA: which of two solutions is likelier, per token", _commonsense, "piqa_valid"),
)
