"""The scorers by hand-worked values, and the protocols on answers written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everedit.edit import Edit
from everedit.evaluation.metrics import (
    all_tokens_match,
    exact_match,
    mean,
    natural_stop,
    normalise_answer,
    prefers,
    token_accuracy,
)
from everedit.evaluation.protocols import GENERAL, METRICS, PROTOCOLS, Answers
from everedit.evaluation.read import Reading

TOKENS = "teacher-forced/token-accuracy@1"
ALL = "teacher-forced/all-tokens@1"
COMPARE = "probability-comparison@1"
FREE = "free-generation/exact-match@1"

# --------------------------------------------------------------------------- token metrics


@pytest.mark.parametrize(
    ("predicted", "reference", "share"),
    [
        ([5], [5], 1.0),
        ([5], [6], 0.0),
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 0.75),
        ([2, 1], [1, 2], 0.0),
        ((7, 7, 7), [7, 8, 7], 2 / 3),
    ],
)
def test_token_accuracy_and_all_tokens_match(predicted: list[int], reference: list[int], share: float) -> None:
    assert token_accuracy(predicted, reference) == pytest.approx(share)
    assert all_tokens_match(predicted, reference) == (1.0 if share == 1.0 else 0.0)


@pytest.mark.parametrize(("predicted", "reference"), [([], []), ([1], []), ([1], [1, 2]), ([1, 2], [1])])
@pytest.mark.parametrize("metric", [token_accuracy, all_tokens_match])
def test_lengths_that_cannot_be_compared_are_refused(metric, predicted: list[int], reference: list[int]) -> None:
    with pytest.raises(ValueError, match="length"):
        metric(predicted, reference)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_all_tokens_match_is_never_the_kinder_scorer(pairs: list[tuple[int, int]]) -> None:
    predicted, reference = zip(*pairs, strict=True)
    share = token_accuracy(predicted, reference)
    assert 0.0 <= all_tokens_match(predicted, reference) <= share <= 1.0


def test_prefers_is_strict() -> None:
    assert prefers(1.0, 2.0) == 1.0
    assert prefers(2.0, 1.0) == 0.0
    assert prefers(1.5, 1.5) == 0.0
    assert prefers(float("nan"), 1.0) == 0.0


# --------------------------------------------------------------------------- generated text


@pytest.mark.parametrize(
    ("text", "target", "kept"),
    [
        (" Paris. It is a city.", "Paris", "Paris"),
        (" Paris\nQ: next", "Paris", "Paris"),
        ("\n\n Paris\nmore", "Paris", "Paris"),
        ("Paris", "Paris", "Paris"),
        ("Paris, the capital", "Paris", "Paris, the capital"),
        ("", "Paris", ""),
        (". Paris", "Paris", ""),
        # a full stop inside the target does not end the text, the one after it does
        (" J. R. R. Tolkien. He wrote", "J. R. R. Tolkien", "J. R. R. Tolkien"),
        (" U.S. of America", "U.S.", "U.S"),
        (" 3.5 million", "3.5", "3.5 million"),
        (" 3.5. Then", "3.5", "3.5"),
        (" 3.5", "3", "3"),
        (" J. R.\nR. Tolkien", "J. R. R. Tolkien", "J. R."),
    ],
)
def test_natural_stop(text: str, target: str, kept: str) -> None:
    assert natural_stop(text, target) == kept


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("a an the", ""),
        ("Theodore an Anna", "theodore anna"),
        ("U.S.A.", "usa"),
        ("it's", "its"),
        ("  ÉCOLE  ", "école"),
        ("東京", "東京"),
        ("", ""),
    ],
)
def test_normalise_answer(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0x17F), max_size=30))
def test_what_is_normal_has_one_space_between_words_and_no_article(text: str) -> None:
    normal = normalise_answer(text)
    assert normal == " ".join(normal.split())
    assert not {"a", "an", "the"} & set(normal.split(" "))


@pytest.mark.parametrize(
    ("text", "target", "score"),
    [
        (" Cusco", "Cusco", 1.0),
        (" the CUSCO!", "Cusco", 1.0),
        (" Cusco. It is in Peru.", "Cusco", 1.0),
        (" Cusco in Peru", "Cusco", 0.0),
        (" Cus", "Cusco", 0.0),
        (" Lima", "Cusco", 0.0),
        ("", "Cusco", 0.0),
        (" U.S. It", "U.S.", 1.0),
        (" J. R. R. Tolkien. He", "J. R. R. Tolkien", 1.0),
        # a target that normalisation empties is not met by saying nothing
        ("", "A", 0.0),
        (" the", "A", 0.0),
        (" a. Then", "A", 1.0),
    ],
)
def test_exact_match(text: str, target: str, score: float) -> None:
    assert exact_match(text, target) == score


@settings(deadline=None)
@given(st.text(st.characters(categories=["Ll", "Lu", "Nd"]), min_size=1, max_size=20), st.integers(2, 8))
def test_a_target_repeated_forever_has_token_accuracy_1_and_exact_match_0(target: str, times: int) -> None:
    """Teacher forcing and cutting at the target's length hide run-on text; free generation shows it."""
    ids = [ord(char) for char in target]
    assert token_accuracy((ids * times)[: len(ids)], ids) == 1.0
    assert exact_match(" ".join([target] * times), target) == 0.0


def test_mean_of_nothing_is_none_and_what_is_missing_does_not_count() -> None:
    assert mean([]) is None
    assert mean([None, None]) is None
    assert mean([1.0, None, 0.0, None]) == 0.5
    assert mean(iter([0.0])) == 0.0


# --------------------------------------------------------------------------- protocols

EDIT = Edit.parse(
    {
        "prompt": "The capital of Peru is",
        "subject": "Peru",
        "target_new": "Cusco",
        "ground_truth": "Lima",
        "rephrase": ["Peru is governed from", "Q: Capital of Peru? A:"],
        "locality": [
            {"prompt": "The capital of Chile is", "answer": "Santiago"},
            {"prompt": "Bees make", "answer": "sweet honey"},
        ],
        "portability": [{"prompt": "The mayor of Peru's capital speaks", "answer": "Quechua daily"}],
    }
)
ALIAS = Edit.parse(
    {
        **EDIT.model_dump(mode="json", exclude={"portability"}),
        "portability": [{"prompt": "The capital of the Republic of Peru is", "answer": "Cusco"}],
    }
)


def ids(text: str) -> tuple[int, ...]:
    return tuple(sum(word.encode()) for word in text.split())


def pairs_asked(edit: Edit) -> list[tuple[str, str]]:
    prompts = [edit.prompt, *edit.rephrase]
    asked = [(prompt, edit.target_new) for prompt in prompts]
    asked += [(probe.prompt, probe.answer) for probe in (*edit.locality, *edit.portability)]
    if edit.ground_truth:
        asked += [(prompt, edit.ground_truth) for prompt in prompts]
    return asked + [(probe.prompt, edit.target_new) for probe in edit.locality]


def answers(edit: Edit, table: dict[str, str]) -> Answers:
    """What a model says that answers each prompt from a table: sure of that answer, and wrong elsewhere."""
    readings, texts = {}, {}
    for prompt, target in pairs_asked(edit):
        said = table[prompt]
        wanted = ids(target)
        predicted = wanted if said == target else tuple(-token for token in wanted)
        readings[prompt, target] = Reading(wanted, predicted, 0.01 if said == target else 5.0)
        texts[prompt, target] = f" {said}. And so on"
    return Answers(readings, texts)


def old_table(edit: Edit) -> dict[str, str]:
    table = dict.fromkeys([edit.prompt, *edit.rephrase], str(edit.ground_truth))
    table.update({probe.prompt: probe.answer for probe in edit.locality})
    return table | {probe.prompt: "Spanish" for probe in edit.portability}


def new_table(edit: Edit) -> dict[str, str]:
    table = dict.fromkeys([edit.prompt, *edit.rephrase], edit.target_new)
    return table | {probe.prompt: probe.answer for probe in (*edit.locality, *edit.portability)}


@pytest.fixture(params=GENERAL)
def protocol(request: pytest.FixtureRequest):
    return PROTOCOLS[request.param]


def test_there_are_the_four_protocols_of_the_specification_with_versions() -> None:
    assert set(GENERAL) == {TOKENS, ALL, COMPARE, FREE}
    assert [name for name in GENERAL if PROTOCOLS[name].asks(EDIT).write] == [FREE]
    assert all(name.partition("@")[2].isdecimal() and it.name == name for name, it in PROTOCOLS.items())


@pytest.mark.parametrize("edit", [EDIT, ALIAS], ids=["one hop", "alias"])
def test_the_unedited_model_has_locality_1_and_none_of_the_edit(protocol, edit: Edit) -> None:
    base = answers(edit, old_table(edit))
    scores = protocol.score(edit, base, base)
    assert set(scores) == set(METRICS)
    assert scores["locality"] == 1.0
    assert scores["reliability"] == 0.0
    assert scores["generalization"] == 0.0


def test_an_unedited_model_that_is_wrong_everywhere_has_locality_1(protocol) -> None:
    """Locality is measured against what the model said, not against what is true."""
    wrong = answers(EDIT, dict.fromkeys(old_table(EDIT), "nonsense"))
    assert protocol.score(EDIT, wrong, wrong)["locality"] == 1.0


@pytest.mark.parametrize("edit", [EDIT, ALIAS], ids=["one hop", "alias"])
def test_a_lookup_table_scores_1_on_everything_that_is_defined(protocol, edit: Edit) -> None:
    scores = protocol.score(edit, answers(edit, new_table(edit)), answers(edit, old_table(edit)))
    portability = None if protocol.name == COMPARE else 1.0
    assert scores == {"reliability": 1.0, "generalization": 1.0, "locality": 1.0, "portability": portability}


def test_an_editor_that_says_the_target_everywhere_loses_locality_and_portability(protocol) -> None:
    base = answers(EDIT, old_table(EDIT))
    scores = protocol.score(EDIT, answers(EDIT, dict.fromkeys(old_table(EDIT), "Cusco")), base)
    assert scores["reliability"] == scores["generalization"] == 1.0
    assert scores["locality"] == 0.0
    assert scores["portability"] == (None if protocol.name == COMPARE else 0.0)


def test_half_of_the_rephrasings_and_half_of_the_neighbours_give_a_half(protocol) -> None:
    table = new_table(EDIT) | {EDIT.rephrase[1]: "Lima", EDIT.locality[0].prompt: "Cusco"}
    scores = protocol.score(EDIT, answers(EDIT, table), answers(EDIT, old_table(EDIT)))
    assert scores["reliability"] == 1.0
    assert scores["generalization"] == 0.5
    assert scores["locality"] == 0.5


def test_an_edit_without_probes_has_no_score_where_there_is_nothing_to_ask(protocol) -> None:
    bare = Edit(prompt="The capital of Peru is", target_new="Cusco", ground_truth="Lima")
    now, base = answers(bare, new_table(bare)), answers(bare, old_table(bare))
    scores = protocol.score(bare, now, base)
    assert scores == {"reliability": 1.0, "generalization": None, "locality": None, "portability": None}


def test_without_an_old_answer_there_is_nothing_to_compare_with() -> None:
    bare = Edit(prompt="The capital of Peru is", target_new="Cusco")
    now = answers(bare, new_table(bare))
    assert PROTOCOLS[COMPARE].score(bare, now, now)["reliability"] is None


def test_a_neighbour_whose_answer_is_the_target_does_not_count_in_the_comparison() -> None:
    edit = Edit(
        prompt="The capital of Peru is",
        target_new="Cusco",
        ground_truth="Lima",
        locality=[{"prompt": "The old city of the Incas is", "answer": "Cusco"}],
    )
    base = answers(edit, old_table(edit))
    assert PROTOCOLS[COMPARE].score(edit, base, base)["locality"] is None


def test_token_accuracy_is_in_parts_where_all_tokens_is_all_or_nothing() -> None:
    base, now = answers(EDIT, old_table(EDIT)), answers(EDIT, new_table(EDIT))
    for pair, half in {("Bees make", "sweet honey"): 0, (EDIT.portability[0].prompt, "Quechua daily"): 1}.items():
        reading = now.readings[pair]
        predicted = list(reading.predicted)
        predicted[half] = -1
        now.readings[pair] = Reading(reading.target, tuple(predicted), reading.nll)
    parts, whole = (PROTOCOLS[name].score(EDIT, now, base) for name in (TOKENS, ALL))
    assert (parts["locality"], parts["portability"]) == (0.75, 0.5)
    assert (whole["locality"], whole["portability"]) == (0.5, 0.0)


def test_free_locality_asks_for_the_whole_text_not_only_for_its_answer() -> None:
    base, now = answers(EDIT, old_table(EDIT)), answers(EDIT, new_table(EDIT))
    now.texts["Bees make", "sweet honey"] += "!"
    assert PROTOCOLS[FREE].score(EDIT, now, base)["locality"] == 0.5
