"""Edits proposed from sentences: the answer at the end, whom it is about, and what to look at before using it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.data import load_edits
from everedit.data.sentences import Proposal, proposals, propose
from everedit.errors import EditError

SURE = [
    ("The capital of Australia is Lisbon.", "The capital of Australia is", "Australia", "Lisbon"),
    ("Toyota is owned by Nissan", "Toyota is owned by", "Toyota", "Nissan"),
    ("Toko Yasuda plays the piano.", "Toko Yasuda plays the", "Toko Yasuda", "piano"),
    ("The mother tongue of Danielle Darrieux is French.", "The mother tongue of Danielle Darrieux is",
     "Danielle Darrieux", "French"),
    ("Danielle Darrieux's mother tongue is English.", "Danielle Darrieux's mother tongue is", "Danielle Darrieux",
     "English"),
    ("Ida Vane lives in the Republic of the Congo.", "Ida Vane lives in the", "Ida Vane", "Republic of the Congo"),
    ("Where is the Eiffel Tower? Rome", "Where is the Eiffel Tower?", "Eiffel Tower", "Rome"),
    ("What is the twin city of Lyon? It is Manila.", "What is the twin city of Lyon? It is", "Lyon", "Manila"),
    ("Ulm (Germany) was founded in 850", "Ulm (Germany) was founded in", "Ulm (Germany)", "850"),
    ('Ida Vane wrote the book called "Grey Jude".', "Ida Vane wrote the book called", "Ida Vane", "Grey Jude"),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "prompt", "subject", "target"), SURE)
def test_a_plain_sentence_becomes_an_edit(sentence: str, prompt: str, subject: str, target: str) -> None:
    found = propose(sentence)
    assert (found.edit.prompt, found.edit.subject, found.edit.target_new) == (prompt, subject, target)
    assert not [doubt for doubt in found.doubts if "several names" not in doubt]


@pytest.mark.parametrize(
    ("sentence", "doubt"),
    [
        ("Bees make cheese.", "no word leads to the answer"),
        ("the chemical symbol for zinc is Fe", "no name in the prompt"),
        ("Otto Quell met Ida Vane in Ulm.", "several names: Otto Quell, Ida Vane"),
    ],
)
def test_what_is_only_a_guess_is_said(sentence: str, doubt: str) -> None:
    found = propose(sentence)
    assert any(doubt in item for item in found.doubts)
    assert found.as_record()["tags"][0].startswith("check: ")


def test_what_the_sheet_says_is_not_guessed() -> None:
    found = propose("Bees make sweet honey.", target="sweet honey", subject="Bees")
    assert (found.edit.prompt, found.edit.subject, found.edit.target_new) == ("Bees make", "Bees", "sweet honey")
    assert found.doubts == ()
    for sentence, more, message in (
        ("Honey is made by bees.", {"target": "honey"}, "does not end in the target"),
        ("Hello.", {}, "no answer can be told apart"),
        ("The capital of Peru is Lima.", {"subject": "Chile"}, "does not occur in the prompt"),
    ):
        with pytest.raises(EditError, match=message):
            propose(sentence, **more)


def test_built_in_sentences_are_mostly_found_again() -> None:
    """Against the subjects and answers that the data set states; an article before a name does not matter."""
    edits = load_edits("worldfacts").edits
    found = [(edit, propose(f"{edit.prompt} {edit.target_new}.")) for edit in edits]
    answers = sum(proposal.edit.target_new == edit.target_new for edit, proposal in found)
    subjects = sum(str(p.edit.subject).split()[-1] == str(edit.subject).split()[-1] for edit, p in found)
    assert answers / len(edits) > 0.98
    assert subjects / len(edits) > 0.8


@given(st.text(st.sampled_from("aB1 .,?!()'’“—ofthe\u00a0\n"), max_size=40))
def test_any_text_becomes_an_edit_or_one_clear_error(text: str) -> None:
    try:
        found = propose(text)
    except EditError:
        return
    assert str(found.edit.subject) in found.edit.prompt


def test_a_sheet_of_any_format_keeps_its_good_lines(tmp_path: Path) -> None:
    lines = ["The capital of Peru is Cusco.", "", "Hello.", "Toyota is owned by Nissan."]
    (tmp_path / "a.txt").write_text("\r\n".join(lines), encoding="utf-8")
    (tmp_path / "a.csv").write_text("sentence,target\nBees make honey now,honey now\n,x\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"sentence": lines[0]}) + "\n{\n", encoding="utf-8")
    shown = {}
    for file in sorted(tmp_path.iterdir()):
        found = list(proposals(file))
        shown[file.suffix] = [item.line if isinstance(item, Proposal) else item.where for item in found]
    assert shown == {".csv": [2, "line 3"], ".jsonl": [1, "line 2"], ".txt": [1, "line 3", 4]}
    (tmp_path / "b.csv").write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(EditError, match="lacks the column sentence"):
        list(proposals(tmp_path / "b.csv"))


def test_the_command_writes_records_that_can_be_edited_and_loaded(tmp_path: Path) -> None:
    sheet, out = tmp_path / "sheet.txt", tmp_path / "out.jsonl"
    sheet.write_text("The capital of Peru is Cusco.\nBees make cheese.\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["data", "propose", str(sheet), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert [item["line"] for item in json.loads(done.stdout)["proposed"]] == [1, 2]
    edits = load_edits(str(out)).edits
    assert [edit.target_new for edit in edits] == ["Cusco", "cheese"]
    assert [bool(edit.tags) for edit in edits] == [False, True]
    sheet.write_text("Hello.\n", encoding="utf-8")
    assert CliRunner().invoke(app, ["data", "propose", str(sheet), "--out", str(out)]).exit_code == 1
