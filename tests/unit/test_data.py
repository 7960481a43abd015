"""Data: three formats, each set's own form, and every bad record named with its line and what to do about it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from everedit.data import load_edits, review
from everedit.data.load import Loaded
from everedit.edit import Edit, fact_key, subject_span
from everedit.errors import EditError, UnknownName

RECORDS: list[dict[str, Any]] = [
    {"prompt": "The capital of Peru is", "subject": "Peru", "target_new": "Cusco", "ground_truth": "Lima"},
    {"prompt": "The capital of Chad is", "subject": "Chad", "target_new": "Moundou", "rephrase": ["Chad is run from"]},
]
ZSRE = {
    "id": 4,
    "subject": "Otto Quell",
    "src": "Where did Otto Quell go to school?",
    "pred": "Ulm",
    "rephrase": "Which school did Otto Quell attend?",
    "alt": "Bergen",
    "answers": ["Trondheim", "Oslo"],
    "loc": "nq question: who painted the old bridge",
    "loc_ans": "Ida Vane",
    "cond": "Trondheim >> Bergen || Where did Otto Quell go to school?",
    "portability": {"New Question": "In what country did Otto Quell go to school?", "New Answer": "Norway"},
}
COUNTERFACT = {
    "id": 12,
    "prompt": "The mother tongue of Ida Vane is",
    "target_new": "Welsh",
    "subject": "Ida Vane",
    "ground_truth": "Danish",
    "rephrase_prompt": "It rained. Ida Vane, a native speaker of",
    "locality_prompt": "The mother tongue of Otto Quell is",
    "locality_ground_truth": "Danish",
}


def write(path: Path, content: str | list[Any]) -> Path:
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    path.write_text(text, encoding="utf-8")
    return path


# --------------------------------------------------------------------------- formats


def test_the_three_formats_hold_the_same_edits(tmp_path: Path) -> None:
    header = "prompt,subject,target_new,ground_truth,rephrase\n"
    rows = ["The capital of Peru is,Peru,Cusco,Lima,", "The capital of Chad is,Chad,Moundou,,Chad is run from"]
    files = [
        write(tmp_path / "a.jsonl", RECORDS),
        write(tmp_path / "a.ndjson", RECORDS),
        write(tmp_path / "a.json", json.dumps(RECORDS)),
        write(tmp_path / "a.csv", header + "\r\n".join(rows) + "\r\n"),
        write(tmp_path / "A.CSV", "\ufeff" + header + "\n".join(rows)),
    ]
    expected = [Edit.parse(record) for record in RECORDS]
    lines = {".jsonl": [1, 2], ".ndjson": [1, 2], ".json": [1, 2], ".csv": [2, 3], ".CSV": [2, 3]}
    for file in files:
        found = load_edits(str(file))
        assert found.edits == expected, file
        assert found.lines == lines[file.suffix]
        assert found.rejected == []
        assert (found.name, found.path) == ("plain", file)
        assert load_edits("plain", file).edits == expected


def test_empty_lines_and_odd_line_separators_do_not_shift_lines(tmp_path: Path) -> None:
    odd = {**RECORDS[0], "prompt": "Line\u2028two of Peru is"}
    text = f"\n{json.dumps(odd, ensure_ascii=False)}\n\n\r\n{json.dumps(RECORDS[1])}\n"
    found = load_edits("plain", write(tmp_path / "a.jsonl", text))
    assert found.lines == [2, 5]
    assert found.edits[0].prompt == odd["prompt"]


def test_common_other_names_and_flat_probes_are_understood(tmp_path: Path) -> None:
    record = {
        "id": 7,
        "prompt": "The capital of Peru is",
        "target": "Cusco",
        "target_true": "Lima",
        "rephrase_prompt": "Peru is run from",
        "locality_prompt": "The capital of Chad is",
        "locality_ground_truth": "N'Djamena",
        "portability_prompt": "The mayor of Peru's capital works in",
        "portability_answer": "Cusco",
        "subject": "",
    }
    [edit] = load_edits("plain", write(tmp_path / "a.jsonl", [record])).edits
    assert (edit.record, edit.target_new, edit.ground_truth, edit.subject) == ("7", "Cusco", "Lima", None)
    assert edit.rephrase == ("Peru is run from",)
    assert [(probe.prompt, probe.answer) for probe in edit.locality] == [("The capital of Chad is", "N'Djamena")]
    assert [probe.answer for probe in edit.portability] == ["Cusco"]


# --------------------------------------------------------------------------- bad records

BAD: list[tuple[Any, str]] = [
    ({"subject": "Peru", "target_new": "Cusco"}, "the field 'prompt' is missing"),
    ({"prompt": "The capital of Peru is"}, "the field 'target_new' is missing"),
    ({**RECORDS[0], "target_new": "  "}, "the field 'target_new' is empty"),
    ({**RECORDS[0], "subject": "Bolivia"}, "does not occur in the prompt"),
    ({**RECORDS[0], "colour": "red"}, "the field 'colour' is not known"),
    ("not an object", "not an object"),
    (None, "not an object"),
    (RECORDS[0], "the same edit as on line 1"),
    ({**RECORDS[0], "prompt": "The  capital of Peru is", "subject": "\u00a0Peru"}, ""),
    ({**RECORDS[0], "target_new": "Arequipa"}, "contradicts line 1: the same prompt with another target"),
    ({**RECORDS[0], "prompt": "THE CAPITAL OF PERU IS", "target_new": "Ica"}, "contradicts line 1"),
    ({**RECORDS[0], "target_new": "half \ud83d"}, "surrogate"),
    ({**RECORDS[0], "target_new": 5}, "target_new"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_every_bad_record_is_named_with_its_line_and_what_to_do(suffix: str, tmp_path: Path) -> None:
    records = [RECORDS[0], *(record for record, _ in BAD), RECORDS[1]]
    content = records if suffix == ".jsonl" else json.dumps(records)
    found = load_edits("plain", write(tmp_path / f"a{suffix}", content))
    expected = {line: reason for line, (_, reason) in enumerate(BAD, start=2) if reason}
    assert [item.line for item in found.rejected] == sorted(expected)
    for item in found.rejected:
        assert expected[item.line] in item.reason
        assert item.fix
        assert set(item.as_dict()) == {"line", "reason", "fix", "record"}
        json.dumps(item.as_dict(), ensure_ascii=False).encode()
    # Two spaces are another prompt; nothing else was kept besides the first and the last.
    assert len(found.edits) == 3
    assert found.lines == [1, 10, len(records)]


def test_a_line_that_is_no_json_is_set_aside(tmp_path: Path) -> None:
    text = f'{json.dumps(RECORDS[0])}\n{{"prompt": "cut o\n{json.dumps(RECORDS[1])}\n{"[" * 100_000}\n'
    found = load_edits("plain", write(tmp_path / "a.jsonl", text))
    assert found.lines == [1, 3]
    assert [(item.line, item.reason[:14]) for item in found.rejected] == [(2, "not valid JSON"), (4, "not valid JSON")]


def test_bad_csv_rows_are_set_aside_with_their_lines(tmp_path: Path) -> None:
    text = (
        "prompt,target_new\n"
        "The capital of Peru is,Cusco\n"
        '"two\nlines of Peru are",x\n'
        "too,many,cells\n"
        "no target\n"
        "\n"
        'an "open" cell,fine\n'
        'The rest,"is open\n'
    )
    found = load_edits("plain", write(tmp_path / "a.csv", text))
    assert found.lines == [2, 3, 8]
    reasons = {item.line: item.reason for item in found.rejected}
    assert reasons.keys() == {5, 6, 9}
    assert "more cells than columns: ['cells']" in reasons[5]
    assert "'target_new' is missing" in reasons[6]
    assert "not valid CSV" in reasons[9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", json.dumps(RECORDS[0]), "holds a list of records"),
        ("a.csv", "", "lacks the column"),
        ("a.csv", "prompt,answer\nx,y\n", "lacks the column target or target_new"),
        ("a.csv", "prompt,target_new,prompt\nx,y,z\n", "two columns named prompt"),
        ("a.txt", "x", "cannot tell the format of a '.txt' file"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_one_error(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EditError, match=message) as caught:
        load_edits(str(write(tmp_path / name, content)))
    assert str(tmp_path) in caught.value.where
    assert caught.value.fix


def test_files_and_sets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no such data file"):
        load_edits(str(tmp_path / "none.jsonl"))
    with pytest.raises(UnknownName, match="did you mean worldfacts"):
        load_edits("worldfact")
    with pytest.raises(EditError, match=r"(?s)does not ship.*--data-path"):
        load_edits("zsre")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EditError, match="cannot read the file"):
        load_edits("plain", tmp_path / "binary.jsonl")


def test_contradictions_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [RECORDS[0], {**RECORDS[0], "target_new": "Ica"}, RECORDS[0]])
    assert [len(load_edits("plain", file, keep_contradictions=keep).edits) for keep in (False, True)] == [1, 2]
    assert [item.line for item in load_edits("plain", file, keep_contradictions=True).rejected] == [3]


def test_a_review_leaves_what_it_was_given(tmp_path: Path) -> None:
    edit = Edit.parse(RECORDS[0])
    given = Loaded("x", tmp_path, [edit, edit], [1, 2])
    assert len(review(given).rejected) == 1
    assert (len(given.edits), given.rejected) == (2, [])


# --------------------------------------------------------------------------- the sets of the literature


def test_zsre_is_edited_to_alt(tmp_path: Path) -> None:
    bare = {key: ZSRE[key] for key in ("subject", "src", "alt")} | {"src": "Where was Otto Quell born?"}
    found = load_edits("zsre", write(tmp_path / "zsre.json", json.dumps([ZSRE, bare, {"prompt": "x"}])))
    whole, short = found.edits
    assert (whole.prompt, whole.subject, whole.target_new) == (ZSRE["src"], "Otto Quell", "Bergen")
    assert whole.ground_truth == "Trondheim"
    assert whole.rephrase == (ZSRE["rephrase"],)
    assert [(p.prompt, p.answer, p.kind) for p in whole.locality] == [(ZSRE["loc"], "Ida Vane", "unrelated")]
    assert [(p.answer, p.kind) for p in whole.portability] == [("Norway", "one_hop")]
    assert (short.rephrase, short.locality, short.portability, short.ground_truth) == ((), (), (), None)
    assert [item.line for item in found.rejected] == [3]
    assert "'prompt' is missing" in found.rejected[0].reason


def test_counterfact_in_its_reduced_form(tmp_path: Path) -> None:
    odd = {**COUNTERFACT, "rephrase_prompt": {}}
    found = load_edits("counterfact", write(tmp_path / "cf.jsonl", [COUNTERFACT, odd]))
    [edit] = found.edits
    assert (edit.prompt, edit.subject, edit.target_new) == (COUNTERFACT["prompt"], "Ida Vane", "Welsh")
    assert edit.ground_truth == "Danish"
    assert edit.rephrase == (COUNTERFACT["rephrase_prompt"],)
    assert [(p.prompt, p.answer, p.kind) for p in edit.locality] == [
        (COUNTERFACT["locality_prompt"], "Danish", "same_relation")
    ]
    [bad] = found.rejected
    assert bad.line == 2
    assert "rephrase" in bad.reason


def test_numbers_as_ids_are_read(tmp_path: Path) -> None:
    for name, record in (("zsre", ZSRE), ("counterfact", COUNTERFACT)):
        [edit] = load_edits(name, write(tmp_path / f"{name}.jsonl", [record])).edits
        assert edit.record == str(record["id"])


# --------------------------------------------------------------------------- our own


@pytest.fixture(scope="module")
def worldfacts() -> list[Edit]:
    found = load_edits("worldfacts")
    assert found.rejected == []
    return found.edits


def test_worldfacts_is_large_unique_and_of_many_relations(worldfacts: list[Edit]) -> None:
    assert len(worldfacts) >= 300
    assert len({edit.id for edit in worldfacts}) == len({fact_key(edit) for edit in worldfacts}) == len(worldfacts)
    assert len({edit.record for edit in worldfacts}) == len(worldfacts)
    relations = Counter(edit.relation for edit in worldfacts)
    assert len(relations) >= 20
    assert min(relations.values()) >= 5
    # The demo takes the first fifty: they are a mixture, too.
    assert len({edit.relation for edit in worldfacts[:50]}) >= 15


def test_worldfacts_subjects_stand_in_prompts_and_rephrasings(worldfacts: list[Edit]) -> None:
    for edit in worldfacts:
        assert edit.subject is not None
        assert subject_span(edit.prompt, edit.subject) is not None
        for text in edit.rephrase:
            assert subject_span(text, edit.subject) is not None, text
        assert edit.target_new not in edit.prompt
        assert edit.prompt == edit.prompt.rstrip()


def test_worldfacts_targets_are_wrong_answers_of_the_same_relation(worldfacts: list[Edit]) -> None:
    answers: dict[Any, set[str]] = defaultdict(set)
    for edit in worldfacts:
        assert edit.ground_truth is not None
        answers[edit.relation].add(edit.ground_truth)
    for edit in worldfacts:
        assert edit.target_new != edit.ground_truth
        assert edit.target_new in answers[edit.relation], edit


def test_worldfacts_has_every_kind_of_probe(worldfacts: list[Edit]) -> None:
    for edit in worldfacts:
        assert len(set(edit.rephrase) - {edit.prompt}) == len(edit.rephrase) >= 2
        # Different constructions: the texts around the subject differ, not a word or two.
        assert len({text.split()[0] for text in (edit.prompt, *edit.rephrase)}) >= 2
        kinds = {probe.kind for probe in edit.locality}
        assert {"same_relation", "unrelated"} <= kinds
        for probe in edit.locality:
            assert probe.prompt not in (edit.prompt, *edit.rephrase)
            if probe.kind == "same_relation":
                assert subject_span(probe.prompt, str(edit.subject)) is None
    assert sum(bool(edit.portability) for edit in worldfacts) >= len(worldfacts) / 2
