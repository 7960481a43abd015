"""An edit is valid or refused by name, has one id on every machine, and finds its subject where it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from everedit.edit import Edit, clean_text, fact_key, subject_span
from everedit.errors import EditError

NBSP = "\u00a0"
ODD_SPACES = "\u00a0\u2007\u202f\u2009\u200a\u3000"

RECORD: dict[str, Any] = {
    "prompt": "The capital of Peru is",
    "subject": "Peru",
    "target_new": "Cusco",
    "ground_truth": "Lima",
    "rephrase": ["Peru is governed from"],
    "locality": [{"prompt": "The capital of Chile is", "answer": "Santiago", "kind": "same_relation"}],
    "portability": [{"prompt": "The mayor of the capital of Peru works in", "answer": "Cusco"}],
}


def parsed(**changes: Any) -> Edit:
    return Edit.parse(RECORD | changes)


# --------------------------------------------------------------------------- content id


def test_the_id_is_the_one_written_down_here_on_every_machine() -> None:
    # Run folders are resumed by these ids: a change of the recipe would orphan every older run.
    assert parsed().id == "3670adedf44087a7"


def test_the_id_does_not_depend_on_the_process() -> None:
    code = "import json,sys; from everedit.edit import Edit; print(Edit.parse(json.load(sys.stdin)).id)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(RECORD),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert out.stdout.strip() == parsed().id


@pytest.mark.parametrize(
    "changes",
    [
        {"rephrase": []},
        {"locality": []},
        {"portability": []},
        {"ground_truth": None},
        {"relation": "capital"},
        {"record": "row 7"},
    ],
)
def test_the_id_is_independent_of_probes_and_labels(changes: dict[str, Any]) -> None:
    assert parsed(**changes).id == parsed().id


@pytest.mark.parametrize(
    "changes", [{"target_new": "Arequipa"}, {"subject": "capital"}, {"subject": None}, {"prompt": "Peru:"}]
)
def test_the_id_changes_with_the_fact(changes: dict[str, Any]) -> None:
    assert parsed(**changes).id != parsed().id


def test_the_id_is_the_same_however_the_text_was_typed() -> None:
    typed = parsed(prompt=f"  The capital of{NBSP}Peru is\r\n", subject="Peru ", target_new="\u2009Cusco")
    assert typed.id == parsed().id


def test_the_id_keeps_fields_apart() -> None:
    one = Edit(prompt="a b", subject="b", target_new="c")
    other = Edit(prompt="a b", subject=None, target_new="b c")
    assert one.id != other.id


# --------------------------------------------------------------------------- clean text


@pytest.mark.parametrize(
    ("typed", "clean"),
    [
        ("Cafe\u0301", "Café"),
        (f"New{NBSP}York", "New York"),
        (f"a{ODD_SPACES}b", "a" + " " * len(ODD_SPACES) + "b"),
        ("one\r\ntwo\rthree\nfour", "one\ntwo\nthree\nfour"),
        ("  \ufeff  ", "\ufeff"),
        (" \t\r\n x \n", "x"),
    ],
)
def test_clean_text(typed: str, clean: str) -> None:
    assert clean_text(typed) == clean


@settings(deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once_and_leaves_nothing_odd(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert clean == clean.strip()
    assert unicodedata.is_normalized("NFC", clean)
    assert not set(clean) & {*ODD_SPACES, "\r"}


def test_every_text_of_an_edit_is_cleaned() -> None:
    odd = f"x{NBSP}y\r\n"
    edit = Edit.parse(
        {
            "prompt": odd,
            "subject": odd,
            "target_new": odd,
            "ground_truth": odd,
            "rephrase": [odd],
            "locality": [{"prompt": odd, "answer": odd}],
            "portability": [{"prompt": odd, "answer": odd}],
        }
    )
    probes = (*edit.locality, *edit.portability)
    texts = [edit.prompt, edit.subject, edit.target_new, edit.ground_truth, *edit.rephrase]
    texts += [text for probe in probes for text in (probe.prompt, probe.answer)]
    assert texts == ["x y"] * 9


def test_one_rephrase_may_be_given_as_a_plain_text() -> None:
    assert parsed(rephrase="Peru is governed from").rephrase == ("Peru is governed from",)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("field", ["prompt", "target_new"])
def test_a_missing_field_is_named(field: str) -> None:
    record = {key: value for key, value in RECORD.items() if key != field}
    with pytest.raises(EditError, match=f"the field '{field}' is missing"):
        Edit.parse(record)


@pytest.mark.parametrize("empty", ["", "   ", "\r\n", NBSP])
@pytest.mark.parametrize("field", ["prompt", "target_new", "subject", "ground_truth"])
def test_an_empty_field_is_named(field: str, empty: str) -> None:
    with pytest.raises(EditError, match=f"the field '{field}' is empty"):
        parsed(**{field: empty})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"targt": "Cusco"}, "the field 'targt' is not known"),
        ({"rephrase": ["fine", ""]}, "the field 'rephrase.1' is empty"),
        ({"locality": [{"prompt": "The sea is"}]}, "the field 'locality.0.answer' is missing"),
        ({"portability": [{"prompt": " ", "answer": "x"}]}, "the field 'portability.0.prompt' is empty"),
        ({"locality": [{"prompt": "a", "answer": "b", "c": "d"}]}, "the field 'locality.0.c' is not known"),
        ({"prompt": 5}, "'prompt'"),
        ({"target_new": None}, "'target_new'"),
        ({"target_new": ["Cusco"]}, "'target_new'"),
        ({"rephrase": [1]}, "'rephrase.0'"),
        ({"locality": "The sea is"}, "'locality'"),
        ({"target_new": "half \ud83d"}, "'target_new'"),
    ],
)
def test_a_bad_field_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EditError) as caught:
        parsed(**changes)
    assert named in caught.value.what
    assert caught.value.fix


def test_all_bad_fields_are_named_at_once_with_the_place() -> None:
    with pytest.raises(EditError) as caught:
        Edit.parse({"prompt": "", "colour": "red"}, where="facts.jsonl, line 3")
    for field in ("prompt", "target_new", "colour"):
        assert f"'{field}'" in caught.value.what
    assert "facts.jsonl, line 3" in str(caught.value)


@pytest.mark.parametrize("record", [None, [], "text", 3])
def test_what_is_no_record_is_an_edit_error(record: Any) -> None:
    with pytest.raises(EditError):
        Edit.parse(record)


def test_a_subject_that_is_not_in_the_prompt_is_refused_with_both_texts() -> None:
    with pytest.raises(EditError) as caught:
        parsed(subject="Chile")
    assert "Chile" in caught.value.what
    assert RECORD["prompt"] in caught.value.what


def test_a_subject_inside_a_longer_word_is_refused() -> None:
    with pytest.raises(EditError, match="does not occur"):
        Edit.parse({"prompt": "George Romero directed", "subject": "Rome", "target_new": "x"})


def test_an_edit_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed().prompt = "else"  # type: ignore[misc]


def test_fact_key_ignores_case_and_target_but_not_the_prompt() -> None:
    assert fact_key(parsed()) == fact_key(parsed(prompt="THE CAPITAL OF PERU IS", target_new="Arequipa"))
    assert fact_key(parsed()) != fact_key(parsed(prompt="The seat of Peru is"))


# --------------------------------------------------------------------------- subject span


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("Rome is older than Rome", "Rome", "19:23"),
        ("Rome", "Rome", "0:4"),
        ("a capital is Rome", "Rome", "13:17"),
        ("Rome, not Romero", "Rome", "0:4"),
        ("Romero and Jerome", "Rome", None),
        ("Romero", "Rome", None),
        ("Rome_2", "Rome", None),
        ("Rome2", "Rome", None),
        ("Rome's mayor", "Rome", "0:4"),
        ("(Rome)", "Rome", "1:5"),
        ("Öland", "land", None),
        ("in ROME", "Rome", "3:7"),
        # exact case is preferred, even where another case comes later
        ("Apple makes an apple", "Apple", "0:5"),
        ("the US told us", "US", "4:6"),
        (f"in New{NBSP}York today", "New York", "3:11"),
        ("in New York today", f"New{NBSP}York", "3:11"),
        ("日本の首都は東京です", "東京", "6:8"),
        ("東京は東京", "東京", "3:5"),
        ("Tokyo東京Tokyo", "Tokyo", "7:12"),
        ("서울은", "서울", "0:2"),
        ("what is C++?", "C++", "8:11"),
        ("aa aa aa", "aa aa", "3:8"),
        ("Who was Yahoo!", "Yahoo!", "8:14"),
        ("ΟΔΥΣΣΕΎΣ came home", "Οδυσσεύς", "0:8"),
        ("İstanbul and IZMIR", "Izmir", "13:18"),
        ("DIE STRAẞE", "Straße", "4:10"),
        ("anything", "missing", None),
    ],
)
def test_subject_span(text: str, subject: str, found: str | None) -> None:
    span = subject_span(text, subject)
    assert (None if span is None else f"{span[0]}:{span[1]}") == found


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
CASES = st.sampled_from([str, str.upper, str.lower, str.title, str.swapcase])


def folded(text: str) -> str:
    return "".join(" " if char in ODD_SPACES else char for char in text).casefold()


@settings(deadline=None)
@given(before=WORDS, subject=WORDS, after=WORDS, change=CASES)
def test_the_span_found_always_covers_the_subject_up_to_case(
    before: str, subject: str, after: str, change: Any
) -> None:
    text = f"{before} {change(subject)} {after}"
    span = subject_span(text, subject)
    if span is not None:
        start, end = span
        assert 0 <= start < end <= len(text)
        assert folded(text[start:end]) == folded(subject)


@settings(deadline=None)
@given(before=WORDS, subject=WORDS, after=WORDS, change=CASES)
def test_a_subject_between_spaces_is_always_found(before: str, subject: str, after: str, change: Any) -> None:
    written = change(subject)
    # "ß".upper() is "SS": another length is another spelling, not another case.
    assume(len(written) == len(subject))
    assume(all(len(a.casefold()) == len(b.casefold()) == 1 for a, b in zip(written, subject, strict=True)))
    assume(folded(written) == folded(subject))
    assert subject_span(f"{before} {written} {after}", subject) is not None


@settings(deadline=None)
@given(subject=WORDS, fillers=st.lists(WORDS, max_size=3))
def test_of_several_occurrences_the_last_is_found(subject: str, fillers: list[str]) -> None:
    text = " ".join([subject, *fillers, subject])
    assert subject_span(text, subject) == (len(text) - len(subject), len(text))


@settings(deadline=None)
@given(st.text(st.characters(categories=["Ll", "Lu"]), min_size=1, max_size=8))
def test_a_word_inside_a_longer_word_is_never_found(word: str) -> None:
    for text in (f"q{word}", f"{word}q", f"7{word}_"):
        span = subject_span(text, word)
        assert span is None
