"""The card shows what it was told, character by character, and what was measured; and where the figures come from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from everedit.edit import Edit
from everedit.errors import EditError, NotApplicable
from everedit.evaluation import Evaluator
from everedit.evaluation.perplexity import perplexity
from everedit.export import Damage, FactRecord, Source, export, measured
from everedit.export.card import escaped
from everedit.patch import LowRank, Patch
from tests.support import facts
from tests.support.editing import home_town, make_editor, probes
from tests.support.loading import edit_of, fresh, shared

WEIGHT = "model.layers.1.mlp.down_proj.weight"
PROTOCOL = "teacher-forced/all-tokens@1"
MARKDOWN = MarkdownIt("commonmark").enable("table")


def tokens(text: str) -> list[Token]:
    found = MARKDOWN.parse(text)
    return [inner for token in found for inner in (token, *(token.children or ()))]


def shown(inline: Token) -> str:
    return "".join(" " if child.type == "softbreak" else child.content for child in inline.children or ())


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a page, as a reader sees its cells."""
    found: list[list[list[str]]] = []
    for token in MARKDOWN.parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and found[-1] and token.level > 3:
            found[-1][-1].append(shown(token))
    return found


def table(text: str, first: str) -> list[list[str]]:
    return next(rows for rows in tables(text) if rows[0][0] == first)


def source(records: list[FactRecord], **more: Any) -> Source:
    change = Patch({WEIGHT: LowRank(torch.ones(64, 1) * 0.01, torch.ones(256, 1))})
    return Source.of_patch(shared("llama"), change, facts=records, **more)


def card(folder: Path, *records: FactRecord, **more: Any) -> str:
    export(source(list(records), **more), "card", folder / "card")
    return (folder / "card" / "README.md").read_text(encoding="utf-8")


def record(**more: Any) -> FactRecord:
    return FactRecord(edit_of(facts.facts()[0]), **more)


# --------------------------------------------------------------------------- every fact


def test_every_fact_stands_there_with_who_when_source_and_until(tmp_path: Path) -> None:
    edits = [edit_of(fact, ground_truth=fact.answer) for fact in facts.facts()[:3]]
    records = [
        FactRecord(
            edits[0], id="commit-1", by="dana", at="2026-11-22T10:00:00+00:00", source="https://example.org/a_b"
        ),
        FactRecord(edits[1], by="lee", until="2027-06-30", source="the handbook, page 7"),
        FactRecord(edits[2]),
    ]
    page = card(tmp_path, *records)
    rows = table(page, "#")
    assert rows[0] == ["#", "prompt", "answer now", "answer before", "by", "when", "source", "until", "id"]
    told = [[edit.prompt, edit.target_new, edit.ground_truth] for edit in edits]
    assert rows[1][1:] == [*told[0], "dana", "2026-11-22T10:00:00+00:00", "https://example.org/a_b", "–", "commit-1"]
    assert rows[2][1:] == [*told[1], "lee", "–", "the handbook, page 7", "2027-06-30", edits[1].id]
    assert rows[3][1:] == [*told[2], "–", "–", "–", "–", edits[2].id]
    assert [token.attrs["href"] for token in tokens(page) if token.type == "link_open"] == ["https://example.org/a_b"]
    assert "Not measured." in page
    about = json.loads((tmp_path / "card" / "everedit.json").read_text())
    assert [Edit.model_validate(fact["edit"]) for fact in about["facts"]] == edits


def test_a_card_without_facts_says_so(tmp_path: Path) -> None:
    assert "None recorded." in card(tmp_path)


def test_the_model_is_named_and_hashed(tmp_path: Path) -> None:
    made_by = {
        "method": "memit",
        "method_settings": {"layers": [1]},
        "policy": "simie",
        "policy_settings": {"lam": 1.0},
    }
    page = card(tmp_path, record(), made_by=made_by)
    told = dict(row[:2] for row in table(page, "what"))
    assert told["SHA-256 over its weights"] == shared("llama").fingerprint
    assert told["method"] == 'memit: {"layers": [1]}'
    assert told["policy"] == 'simie: {"lam": 1.0}'
    assert "/" not in told["base model"]
    weight, norm, relative, digest = table(page, "weight")[1]
    base = float(shared("llama").model.get_parameter(WEIGHT).norm())
    assert weight == WEIGHT
    assert (float(norm), float(relative)) == (pytest.approx(1.28, rel=1e-2), pytest.approx(1.28 / base, rel=1e-2))
    assert len(digest) == 64


def test_the_front_matter_is_yaml_that_the_hub_reads(tmp_path: Path) -> None:
    lm = fresh("llama")
    for name, known in (("someone/some-model", True), ("smollm2-135m", False), ("x/y\nevil: true", False)):
        lm.name = name
        export(Source.of_patch(lm, source([]).change), "peft", tmp_path / str(len(name)))
        _, front, rest = (tmp_path / str(len(name)) / "README.md").read_text().split("---\n", 2)
        about = yaml.safe_load(front)
        assert about["library_name"] == "peft"
        assert about.get("base_model") == (name if known else None)
        assert "evil" not in about
        assert rest.strip().startswith("# ")


# --------------------------------------------------------------------------- what people write


NASTY = [
    "a | b", "**bold** _it_ `code`", "<script>alert(1)</script>", "[click](javascript:alert(1))", "$x^2$",
    "![x](http://x/y.png)", "line\none\r\nmore\tof it", "# no heading", "&amp; &lt;", "back\\slash \\| \\*", "~~gone~~",
    "1. - + * list", "```\nfence", "<https://example.org>", "| --- |", "\u2028next", "tail\\",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_what_users_write_is_shown_as_it_is_and_does_nothing(text: str, tmp_path: Path) -> None:
    edit = Edit(prompt=f"before {text} after", target_new=f"x {text} y")
    page = card(tmp_path, FactRecord(edit, by=text, source=text, until=text, id=text))
    row = table(page, "#")[1]
    plain = " ".join(text.split())
    assert len(row) == 9
    assert (row[1], row[2]) == (f"before {plain} after", f"x {plain} y")
    assert (row[4], row[6], row[7], row[8]) == (plain,) * 4
    kinds = {token.type for token in tokens(page)}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "fence", "em_open", "strong_open", "s_open"}


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_survives_the_way_through_markdown(text: str) -> None:
    page = f"| a |\n| --- |\n| x{escaped(text)}x |\n"
    [[_, [cell]]] = tables(page)
    assert "\n" not in escaped(text)
    visible = cell.replace("\u00a0", " ")
    for char in text:
        if not char.isspace() and char.isprintable():
            assert char in visible
    assert all(token.type not in ("html_inline", "link_open", "image", "code_inline") for token in tokens(page))


def test_characters_that_turn_text_round_are_named() -> None:
    assert escaped("safe\u202egnp.exe") == "safe(U+202E)gnp.exe"


@pytest.mark.parametrize(
    ("address", "linked"),
    [
        ("https://example.org/a?b=c&d=e#f", True),
        ("http://example.org", True),
        ("javascript:alert(1)", False),
        ("https://example.org/<script>", False),
        ("https://example.org/a|b", False),
        ("https://", False),
        ("https://[broken", False),
        ("see https://example.org", False),
    ],
)
def test_only_plain_web_addresses_are_links(address: str, linked: bool, tmp_path: Path) -> None:
    page = card(tmp_path, record(source=address))
    links = [token.attrs["href"] for token in tokens(page) if token.type == "link_open"]
    assert bool(links) == linked
    assert table(page, "#")[1][6] == address


# --------------------------------------------------------------------------- what it cost


def test_the_damage_is_what_the_evaluator_and_the_text_say(corpus_path: Path, tmp_path: Path, own_cache: Path) -> None:
    editor = make_editor("llama", corpus_path, "memit")
    edits = [home_town(0, locality=probes()), home_town(10, locality=probes())]
    baseline = Evaluator(editor.lm).baseline(edits)
    texts = facts.sentences()[-6:]
    before = perplexity(editor.lm, texts)
    editor.edit(edits, score=False)
    records, damage = measured(editor, [FactRecord(edit) for edit in edits], texts, "six *sentences*")
    scores = [item.scores[PROTOCOL] for item in Evaluator(editor.lm).score(edits, baseline)]
    assert [dict(one.after[PROTOCOL]) for one in records] == scores
    assert damage.after[PROTOCOL]["reliability"] == sum(row["reliability"] or 0 for row in scores) / 2 == 1.0
    assert damage.before[PROTOCOL]["reliability"] == 0.0
    assert (damage.tokens, damage.perplexity_before) == (before.tokens, before.value)
    assert damage.perplexity_after == perplexity(editor.lm, texts).value
    export(Source.of_editor(editor, records, damage=damage), "card", tmp_path / "card")
    page = (tmp_path / "card" / "README.md").read_text()
    rows = {(row[0], row[1]): row[2:] for row in table(page, "protocol")[1:]}
    assert rows[PROTOCOL, "unedited"][0] == "0"
    assert rows[PROTOCOL, "edited"][0] == "1"
    assert rows[PROTOCOL, "edited"][3] == "–"
    assert f"Perplexity on {before.tokens} tokens of six \\*sentences\\*: {before.value:.3g} unedited" in page
    fact = dict(zip(*table(page, "#")[:2], strict=True))
    assert fact["reliability"] == "0 → 1"
    assert fact["locality"].startswith("1 → ")


def test_a_perplexity_without_bounds_is_written_as_json_can(tmp_path: Path) -> None:
    damage = Damage(text="a text", tokens=3, perplexity_before=2.5, perplexity_after=math.inf)
    assert "2.5 unedited, inf edited" in card(tmp_path, record(), damage=damage)
    about = (tmp_path / "card" / "everedit.json").read_text()
    assert json.loads(about, parse_constant=pytest.fail)["damage"]["perplexity_after"] == "inf"


def test_nothing_is_said_to_have_been_measured_that_was_not(tmp_path: Path) -> None:
    page = card(tmp_path, record(), damage=Damage())
    assert "Not measured." in page
    assert "Perplexity" not in page


# --------------------------------------------------------------------------- perplexity


def test_perplexity_is_exp_of_the_mean_loss_as_transformers_computes_it() -> None:
    lm = shared("llama")
    texts = facts.sentences()[:3]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += float(lm.model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = perplexity(lm, texts)
    assert found.tokens == count
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-5)


def test_long_texts_are_read_in_windows_that_predict_every_token_once() -> None:
    lm, text = shared("llama"), " ".join(facts.sentences()[:12])
    ids = lm.tokenizer(text)["input_ids"]
    assert len(ids) > 60
    loss = 0.0
    for start in range(0, len(ids) - 1, 15):
        row = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            loss += float(lm.model(row, labels=row).loss) * (row.shape[1] - 1)
    found = perplexity(lm, [text], window_tokens=16)
    assert found.tokens == len(ids) - 1
    assert found.value == pytest.approx(math.exp(loss / found.tokens), rel=1e-5)


def test_perplexity_refuses_what_it_cannot_read() -> None:
    with pytest.raises(EditError, match="no token to predict"):
        perplexity(shared("llama"), [""])
    with pytest.raises(NotApplicable, match="encoder-decoder"):
        perplexity(shared("t5"), ["a text"])


def test_a_model_that_is_broken_has_a_perplexity_too() -> None:
    lm = fresh("llama")
    lm.model.get_output_embeddings().weight.mul_(1e5)
    assert perplexity(lm, facts.sentences()[:1]).value == math.inf
