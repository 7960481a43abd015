"""The sets of the literature: what each record becomes, where files are found, what a stream of them contradicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from everedit.data import data_names, data_set, load_edits
from everedit.data.answers import answers, probes
from everedit.data.contradictions import contradicted_by
from everedit.edit import Edit
from everedit.errors import EditError, UnknownName
from everedit.evaluation import FOR_ANY_DATA, PROTOCOLS
from tests.unit.test_data import COUNTERFACT, ZSRE, write

REWRITE = {
    "prompt": "{} was performed by",
    "relation_id": "P175",
    "target_new": {"str": "Ida Vane", "id": "Q7"},
    "target_true": {"str": "Otto Quell", "id": "Q8"},
    "subject": "Grey Jude",
    "question": "Who performed Grey Jude?",
}
SECOND = {
    "prompt": "The director of {} is",
    "relation_id": "P1037",
    "target_new": {"str": "Nils Brandt", "id": None},
    "target_true": {"str": "Una Holm", "id": None},
    "subject": "Ida Vane",
    "question": "Who is the director of Ida Vane?",
}
MQUAKE = {
    "case_id": 3,
    "requested_rewrite": [REWRITE, SECOND],
    "questions": [
        "Where was the director of the performer of Grey Jude born?",
        "Grey Jude's performer's director: born?",
    ],
    "new_answer": "Ulm",
    "new_answer_alias": ["City of Ulm"],
    "new_single_hops": [
        {"question": "Who performed Grey Jude?", "answer": "Ida Vane", "answer_alias": []},
        {"question": "Who is the director of Ida Vane?", "answer": "Nils Brandt", "answer_alias": []},
        {"question": "Where was Nils Brandt born?", "answer": "Ulm", "answer_alias": ["City of Ulm"]},
    ],
}
FULL = {
    "case_id": 0,
    "requested_rewrite": {**REWRITE, "question": None},
    "paraphrase_prompts": ["It rained.\nGrey Jude, performed by", "Snow. Grey\u00a0Jude by"],
    "neighborhood_prompts": ["Blue Jude was performed by", "Red Jude is by"],
    "attribute_prompts": ["Old Song was performed by"],
    "generation_prompts": ["Grey Jude is a song that"],
    "distracting_neighborhood_prompts": ["Grey Jude was performed by Ida Vane. Blue Jude was performed by"],
    "unrelated_relation": {"relation_id": "genre", "object": "folk", "question": "What is the genre of Grey Jude?"},
    "alternative_subject": "G. Jude",
    "qna_question": "Who performed Grey Jude?",
    "portability": {"Recalled Relation": "(Ida Vane, home, Ulm)", "New Question": "Whence is Grey Jude's performer?",
                    "New Answer": "Ulm"},
    "wilke_toxicity_flash": True,
}  # fmt: skip
KNOWEDIT = {
    "id": "ke-1",
    "subject": "Otto Quell",
    "prompt": "The country of Otto Quell is",
    "target_new": "Norway",
    "ground_truth": ["Denmark", "Kingdom of Denmark"],
    "rephrase_prompt": "Otto Quell is a citizen of",
    "portability": {
        "Reasoning": [{"prompt": "The currency of Otto Quell's country is", "ground_truth": [["krone", "NOK", ""]]}],
        "Subject_Aliasing": [{"prompt": "The country of O. Quell is", "ground_truth": "Norway"}],
        "Logical_Generalization": [{"prompt": "Is Otto Quell Norwegian?", "ground_truth": [[], [""]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The mother of Otto Quell is", "ground_truth": [["Una"], ["Una Quell"]]}],
        "Forgetfulness": [{"prompt": "Otto Quell, not of Norway, is of", "ground_truth": ["Denmark"]}],
    },
}
ALIAS = {"src": "Which school did Quell attend?", "subject": "Otto Quell", "alt": "Bergen", "answers": ["Oslo"],
         "alternative_subject": "O. Quell", "alter_subject_question": "Which school did O. Quell attend?",
         "inverse question": "Who went to school in Bergen?"}  # fmt: skip
SENTENCE = {
    "id": "h1",
    "prompt": "This is a Wikipedia passage about ida vane. She sang. ",
    "target_new": "She was born in Ulm.",
    "subject": "ida vane",
    "locality_prompt": "A map of",
    "locality_ground_truth": "South America",
    "ood_rephrase": "Ida Vane, a singer, was born in Ulm.",
}
RECORDS: dict[str, dict[str, Any]] = {
    "counterfact": COUNTERFACT,
    "counterfact-full": FULL,
    "hallucination": SENTENCE,
    "temporal": SENTENCE,
    "knowedit-zsre": KNOWEDIT,
    "knowedit-counterfact": KNOWEDIT,
    "knowedit-recent": {**KNOWEDIT, "ground_truth": None},
    "knowedit-wikibio": {"text": SENTENCE["prompt"], "labels": SENTENCE["target_new"], "concept": "ida vane",
                         "locality": {"Relation_Specificity": [{"prompt": "ida vane, job", "ground_truth": ["x"]}]}},
    "known-1000": {"known_id": 1, "subject": "Grey Jude", "attribute": "Ida Vane", "prompt": "Grey Jude is by",
                   "relation_id": "P175"},
    "mquake": MQUAKE,
    "plain": {"prompt": "Grey Jude is by", "target_new": "Ida Vane"},
    "qaedit": {"id": "q", "prompt": "who sang grey jude?", "target": "Ida Vane ", "subject": "grey jude",
               "source": "NQ", "rephrase": "Who sings it?", "locality": [{"loc": "who is first", "loc_ans": "Una"}]},
    "worldfacts": {"id": "w", "prompt": "Grey Jude is by", "target_new": "Ida Vane"},
    "zsre": ZSRE,
    "zsre-true": ZSRE,
    "zsre-alias": ALIAS,
    "zsre-inverse": ALIAS,
}  # fmt: skip


def read(name: str, record: dict[str, Any], folder: Path) -> list[Edit]:
    found = load_edits(name, write(folder / f"{name}.jsonl", [record]))
    assert found.rejected == []
    return found.edits


@pytest.mark.parametrize("name", data_names())
def test_every_set_says_what_it_is_and_reads_its_form(name: str, tmp_path: Path) -> None:
    about = data_set(name).about()
    assert len(about["title"]) > 10
    assert about["licence"]
    assert set(about["protocols"]) <= PROTOCOLS.keys()
    assert about["files"] or about["ships"] or name == "plain"
    edits = read(name, RECORDS[name], tmp_path)
    assert edits
    # With the name's other spelling, and as one of a list.
    (tmp_path / "all.json").write_text(json.dumps([RECORDS[name]]), encoding="utf-8")
    assert load_edits(name.replace("-", "_"), tmp_path / "all.json").edits == edits


def test_zsre_in_its_other_variant_is_edited_to_the_truth(tmp_path: Path) -> None:
    [edit] = read("zsre-true", ZSRE, tmp_path)
    assert (edit.target_new, edit.target_aliases, edit.ground_truth) == ("Trondheim", ("Oslo",), None)
    assert [(probe.prompt, probe.answer) for probe in edit.locality] == [(f"{ZSRE['loc']}?", "Ida Vane")]
    assert edit.portability == ()


def test_counterfact_in_romes_own_form_keeps_every_probe(tmp_path: Path) -> None:
    [edit] = read("counterfact-full", FULL, tmp_path)
    assert (edit.prompt, edit.subject) == ("Grey Jude was performed by", "Grey Jude")
    assert (edit.target_new, edit.target_id, edit.ground_truth, edit.relation) == (
        "Ida Vane",
        "Q7",
        "Otto Quell",
        "P175",
    )
    assert edit.rephrase == ("It rained.\nGrey Jude, performed by", "Snow. Grey Jude by")
    assert edit.generation == ("Grey Jude is a song that",)
    assert edit.question == "Who performed Grey Jude?"
    assert edit.tags == ("toxicity_flash",)
    assert [(p.kind, p.answer) for p in edit.locality] == [
        ("neighborhood", "Otto Quell"), ("neighborhood", "Otto Quell"), ("attribute", "Ida Vane"),
        ("distracting_neighborhood", "Otto Quell"), ("same_subject", "folk"),
    ]  # fmt: skip
    assert [(p.kind, p.prompt, p.answer) for p in edit.portability] == [
        ("one_hop", "Whence is Grey Jude's performer?", "Ulm"),
        ("alias", "G. Jude was performed by", "Ida Vane"),
    ]
    assert edit.record == "0"


def test_knowedit_has_answers_in_lists_and_skips_empty_ones(tmp_path: Path) -> None:
    found = load_edits("knowedit-counterfact", write(tmp_path / "a.jsonl", [KNOWEDIT]))
    [edit] = found.edits
    assert (edit.ground_truth, edit.rephrase) == ("Denmark", ("Otto Quell is a citizen of",))
    assert [(p.kind, p.answers) for p in edit.portability] == [("one_hop", ("krone", "NOK")), ("alias", ("Norway",))]
    assert [(p.kind, p.answers) for p in edit.locality] == [
        ("same_subject", ("Una", "Una Quell")),
        ("forgetfulness", ("Denmark",)),
    ]
    assert [(item.line, "without an answer" in item.what) for item in found.notices] == [(1, True)]


def test_sentences_are_edits_with_text_beside_them(tmp_path: Path) -> None:
    [edit] = read("hallucination", SENTENCE, tmp_path)
    assert edit.prompt == "This is a Wikipedia passage about ida vane. She sang."
    assert [(p.kind, p.answer) for p in edit.locality] == [("unrelated", "South America")]
    [other] = read("temporal", SENTENCE, tmp_path)
    assert other.held_out == SENTENCE["ood_rephrase"]
    [biography] = read("knowedit-wikibio", RECORDS["knowedit-wikibio"], tmp_path)
    assert (biography.prompt, biography.target_new) == (edit.prompt, edit.target_new)


def test_portability_asks_for_other_names_and_for_the_reverse(tmp_path: Path) -> None:
    for name, kind, prompt, answer in (
        ("zsre-alias", "alias", "Which school did O. Quell attend?", "Bergen"),
        ("zsre-inverse", "inverse", "Who went to school in Bergen?", "Otto Quell"),
    ):
        found = load_edits(name, write(tmp_path / f"{name}.jsonl", [ALIAS]))
        [edit] = found.edits
        assert [(p.kind, p.prompt, p.answer) for p in edit.portability] == [(kind, prompt, answer)]
        # "Quell" alone stands in the prompt: that is said, and the edit can be made by methods that need no subject.
        assert edit.subject is None
        assert "'Otto Quell' is left out" in found.notices[0].what


def test_a_record_with_several_edits_asks_its_questions_from_the_last_of_them_on(tmp_path: Path) -> None:
    third = {**SECOND, "subject": "Nils Brandt", "prompt": "{} was born in", "target_new": {"str": "Ulm"}}
    # Two edits of the first record again, in another order, and one of its own; then nothing new at all.
    again = {**MQUAKE, "case_id": 4, "requested_rewrite": [third, SECOND, REWRITE], "questions": ["A?"]}
    nothing_new = {**MQUAKE, "case_id": 5, "requested_rewrite": [REWRITE, SECOND], "questions": ["B?"]}
    other = {**SECOND, "target_new": {"str": "Una Holm"}}
    against = {**MQUAKE, "case_id": 6, "requested_rewrite": [{**REWRITE, "subject": "New Jude"}, other]}
    found = load_edits("mquake", write(tmp_path / "m.jsonl", [MQUAKE, again, nothing_new, against]))
    assert [(edit.record, edit.prompt) for edit in found.edits] == [
        ("3/0", "Grey Jude was performed by"),
        ("3/1", "The director of Ida Vane is"),
        ("4/0", "Nils Brandt was born in"),
    ]
    assert [[(p.case, p.prompt) for p in edit.portability] for edit in found.edits] == [
        [],
        [*(("3", question) for question in MQUAKE["questions"]), ("5", "B?")],
        [("4", "A?")],
    ]
    probe = found.edits[1].portability[0]
    assert probe.answers == ("Ulm", "City of Ulm")
    # What the answer rests on beside the edits themselves.
    assert [(need.prompt, need.answer) for need in probe.needs] == [("Where was Nils Brandt born?", "Ulm")]
    # Made together or not at all.
    assert [item.line for item in found.rejected] == [4]
    assert "contradicts line 1" in found.rejected[0].reason
    kept = load_edits("mquake", tmp_path / "m.jsonl", keep_contradictions=True)
    assert [edit.record for edit in kept.edits] == ["3/0", "3/1", "4/0", "6/0", "6/1"]


# --------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Ulm", ["Ulm"]),
        (["Ulm", "", "City of Ulm", "Ulm"], ["Ulm", "City of Ulm"]),
        ([["Ulm", "City\u00a0of Ulm"], ["Bonn"]], ["Ulm", "City of Ulm", "Bonn"]),
        (" a\r\nb ", ["a\nb"]),
        (1984, ["1984"]),
        (None, []),
        ([[], [""]], []),
    ],
)
def test_answers_come_in_many_forms(value: Any, expected: list[str]) -> None:
    assert answers(value) == expected


def test_probes_come_in_many_forms_too() -> None:
    one = {"prompt": "p", "answer": "a"}
    assert [p["answer"] for p in probes(one)] == [p["answer"] for p in probes([one])] == ["a"]
    by_kind = probes({"Reasoning": [{"prompt": "p", "ground_truth": [["a", "b"]]}]}, {"Reasoning": "one_hop"})
    assert by_kind == [{"prompt": "p", "kind": "one_hop", "answer": "a", "aliases": ["b"]}]
    for bad in (["just a text"], [{"prompt": "p", "answer": {"a": 1}}]):
        with pytest.raises(TypeError):
            probes(bad)


def test_the_users_own_records_may_have_lists_of_answers(tmp_path: Path) -> None:
    record = {
        "prompt": "Grey Jude is by", "target_new": ["Ida Vane", "I. Vane"], "ground_truth": [["Otto", "O."]],
        "locality": {"Forgetfulness": [{"prompt": "Old Song is by", "ground_truth": ["Una", "U."]}]},
        "portability": [{"prompt": "x", "answer": ""}],
    }  # fmt: skip
    found = load_edits(str(write(tmp_path / "a.jsonl", [record, {**record, "prompt": "b", "locality": ["text"]}])))
    [edit] = found.edits
    assert (edit.targets, edit.ground_truth) == (("Ida Vane", "I. Vane"), "Otto")
    assert [(p.kind, p.answers) for p in edit.locality] == [("forgetfulness", ("Una", "U."))]
    assert "without an answer" in found.notices[0].what
    assert [item.line for item in found.rejected] == [2]


# --------------------------------------------------------------------------- where files are


def test_a_folder_is_searched_for_the_files_of_the_set(tmp_path: Path) -> None:
    (tmp_path / "counterfact").mkdir()
    file = write(tmp_path / "counterfact" / "edit.jsonl", [COUNTERFACT])
    for folder in (tmp_path, file.parent):
        assert load_edits("counterfact", folder).path == file
    write(tmp_path / "other.csv", "x")
    with pytest.raises(EditError, match="no file that is known for 'qaedit'") as caught:
        load_edits("qaedit", tmp_path)
    assert "other.csv" in caught.value.where
    assert "qaedit/edit.jsonl" in caught.value.fix


def test_parquet_files_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.Table.from_pylist([COUNTERFACT, {**COUNTERFACT, "prompt": "x"}]), tmp_path / "a.parquet"
    )
    found = load_edits("counterfact", tmp_path / "a.parquet")
    assert [edit.prompt for edit in found.edits] == [COUNTERFACT["prompt"]]
    assert [item.line for item in found.rejected] == [2]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(EditError, match="cannot read the file"):
        load_edits("counterfact", tmp_path / "b.parquet")


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: one data set with one file."""

    body = (json.dumps(FULL) + "\n").encode()

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        name = "data/test-00000.jsonl"
        if self.path.startswith("/api/datasets/azhx/counterfact"):
            files = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in ("README.md", name)]
            body = json.dumps(files).encode()
        elif self.path.endswith(f"/{name}"):
            body = self.body
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for key, value in (("ETag", '"abc"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(len(body)))):
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_set_is_fetched_from_the_hub(hub: str, tmp_path: Path) -> None:
    code = """
import dataclasses
from everedit.data import data_set, load_edits
from everedit.data.hub import fetched
known = dataclasses.replace(data_set("counterfact-full"), hub="azhx/counterfact/data/test-*.jsonl")
print(load_edits("counterfact-full", fetched("counterfact-full", known)).edits[0].prompt)
for hub in ("azhx/counterfact/data/none-*.jsonl", "nobody/nothing/a.json"):
    try:
        fetched("counterfact-full", dataclasses.replace(known, hub=hub))
    except Exception as error:
        print(type(error).__name__, error.where)
"""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Grey Jude was performed by",
        "EditError azhx/counterfact/data/none-*.jsonl",
        "EditError nobody/nothing/a.json",
    ]


def test_a_hub_that_cannot_be_reached_is_one_clear_error(tmp_path: Path) -> None:
    code = """
from everedit.data import load_edits
for name in ("counterfact-full", "knowedit-zsre", "qaedit"):
    try:
        load_edits(name, "hub")
    except Exception as error:
        print(type(error).__name__, error.what[:16], "--data-path" in error.fix)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [*["EditError the hub does not True"] * 2, "EditError no copy of 'qaed True"]


def test_a_data_set_is_scored_under_its_own_protocols_only() -> None:
    known = data_set("hallucination")
    known.require_protocols("hallucination", ["wise/hallucination@1", *FOR_ANY_DATA], FOR_ANY_DATA)
    with pytest.raises(EditError, match="not scored under rome/counterfact@1") as caught:
        known.require_protocols("hallucination", ["rome/counterfact@1"], FOR_ANY_DATA)
    assert "wise/hallucination@1" in caught.value.fix
    data_set("plain").require_protocols("plain", list(PROTOCOLS), FOR_ANY_DATA)
    with pytest.raises(UnknownName, match="did you mean hallucination"):
        data_set("halucination")


# --------------------------------------------------------------------------- contradictions


def fact(prompt: str, target: str, **more: Any) -> Edit:
    return Edit.model_validate({"prompt": prompt, "target_new": target, **more})


def test_a_later_record_contradicts_an_earlier_one_in_the_same_or_in_other_words() -> None:
    edits = [
        fact("Where was Ida Vane born?", "Ulm", subject="Ida Vane", ground_truth="Bonn"),  # other words: 4, 5
        fact("Grey Jude is by", "Otto"),  # same words, other case: 3
        fact("Old Song is by", "Una", rephrase=("The singer of Old Song is",)),  # a rephrasing: 6
        fact("grey jude is by", "Ida"),
        fact("What is the birthplace of Ida Vane?", "Kiel", subject="Ida Vane", ground_truth="Bonn"),  # 5
        fact("Ida Vane's home town is", "Ulm", subject="ida vane", ground_truth="bonn"),
        fact("The singer of Old Song is", "Nils"),
        fact("Ida Vane's father is", "Karl", subject="Ida Vane", ground_truth="Otto"),
    ]
    assert contradicted_by(edits) == [4, 3, 6, None, 5, None, None, None]
    # Nothing contradicts in the other direction: what comes first is what is lost.
    assert contradicted_by(edits[:3]) == [None] * 3


def test_one_relation_has_one_answer_and_two_relations_may_share_one() -> None:
    born = fact("Ida Vane was born in", "Ulm", subject="Ida Vane", relation="P19", ground_truth="Bonn")
    died = fact("Ida Vane died in", "Kiel", subject="Ida Vane", relation="P20", ground_truth="Bonn")
    again = fact("The birthplace of Ida Vane is", "Rome", subject="Ida Vane", relation="P19", ground_truth="Bonn")
    assert contradicted_by([born, died, again]) == [2, None, None]
    # The same answer under another name is no contradiction.
    alias = fact(
        "Ida Vane comes from", "the Eternal City", subject="Ida Vane", relation="P19", target_aliases=("Rome",)
    )
    assert contradicted_by([again, alias]) == [None, None]
