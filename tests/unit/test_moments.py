"""Second moments: the plain mean of k k^T, in one pass; cached under all they depend on, and never when damaged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from everedit.engine import moments
from everedit.engine.moments import Corpus, MomentStore, accumulate, describe_cached
from everedit.errors import CacheError, EditError, NumericalError
from everedit.models import LanguageModel, load_model
from tests.support import facts, tiny
from tests.support.loading import DECODERS, bits, fresh, hooks_left, same_bits, shared

LAYERS = (0, 2)


@pytest.fixture
def corpus(corpus_path: Path) -> Corpus:
    """Fifteen windows, the last batch of them not full."""
    return Corpus(corpus_path, tokens=600, window_tokens=40)


def _naive(lm: LanguageModel, rows: list[list[int]], layer: int) -> tuple[Tensor, int]:
    """X^T X / n in float64, one row at a time, with the whole model run."""
    found: list[Tensor] = []
    module = lm.layout.mlp_out(layer)
    handle = module.register_forward_pre_hook(lambda _m, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for row in rows:
            lm.model(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    keys = torch.cat(found).double()
    return keys.T @ keys / len(keys), len(keys)


def _same(found: dict[int, moments.SecondMoment], expected: dict[int, moments.SecondMoment]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[layer].matrix, expected[layer].matrix) and found[layer].tokens == expected[layer].tokens
        for layer in expected
    )


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_plain_mean(family: str, corpus: Corpus, tmp_path: Path) -> None:
    lm = shared(family)
    before = bits(lm)
    rows = list(corpus.windows(lm))
    found = MomentStore(lm, corpus, root=tmp_path).get(LAYERS)
    assert list(found) == list(LAYERS)
    for layer in LAYERS:
        expected, tokens = _naive(lm, rows, layer)
        assert found[layer].tokens == tokens >= 600
        assert found[layer].matrix.dtype == torch.float64
        assert float((found[layer].matrix - expected).norm()) <= 1e-5 * float(expected.norm())
        assert torch.equal(found[layer].matrix, found[layer].matrix.T)
    assert float((found[0].matrix - found[2].matrix).norm()) > 0.1 * float(found[0].matrix.norm())
    assert hooks_left(lm) == []
    assert same_bits(lm, before)


def test_rows_of_different_lengths_count_their_own_tokens() -> None:
    """Padding is no text: what is gathered over ragged rows is what each of them gives alone."""
    lm = shared("gemma2")
    rows = [list(lm.encode(text).ids) for text in facts.sentences()[:21]]
    assert len({len(row) for row in rows}) > 3
    total, seen = accumulate(lm, (1,), iter(rows), batch_rows=4)
    expected, tokens = _naive(lm, rows, 1)
    assert seen == tokens
    assert float((total[1] / seen - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_one_pass_for_all_layers_and_no_further_than_the_deepest(family: str, corpus: Corpus, tmp_path: Path) -> None:
    lm = shared(family)
    inputs: list[int] = []
    outputs: list[int] = []
    handles = [
        hook
        for at in range(4)
        for hook in (
            lm.layout.block(at).register_forward_pre_hook(lambda *_, at=at: inputs.append(at)),
            lm.layout.mlp_out(at).register_forward_hook(lambda *_, at=at: outputs.append(at)),
        )
    ]
    try:
        MomentStore(lm, corpus, root=tmp_path).get((2, 0, 2))
    finally:
        for handle in handles:
            handle.remove()
    # Fifteen windows are two batches.
    assert inputs == [0, 1, 2] * 2
    assert outputs == [0, 1] * 2


def test_layers_in_any_order_and_named_twice(corpus: Corpus, tmp_path: Path) -> None:
    lm = shared("llama")
    expected = MomentStore(lm, corpus, root=tmp_path / "a").get(LAYERS)
    assert _same(MomentStore(lm, corpus, root=tmp_path / "b").get((2, 0, 2)), {2: expected[2], 0: expected[0]})
    alone = MomentStore(lm, corpus, root=tmp_path / "c").get((2,))
    assert torch.equal(alone[2].matrix, expected[2].matrix)
    sums, seen = accumulate(lm, (2, 2), corpus.windows(lm))
    assert torch.equal(sums[2] / seen, expected[2].matrix)


# ------------------------------------------------------------------ the text


@pytest.mark.parametrize("tokens", [100, 600, 10**6])
def test_windows_cut_the_text_joined_by_end_tokens(tokens: int, corpus_path: Path, tmp_path: Path) -> None:
    lm = shared("gpt2")
    end = lm.tokenizer.eos_token_id
    flat = [token for line in facts.sentences() for token in [*lm.tokenizer(line)["input_ids"], end]]
    windows = list(Corpus(corpus_path, tokens=tokens, window_tokens=40).windows(lm))
    joined = [token for window in windows for token in window]
    assert joined == flat[: len(joined)]
    assert all(len(window) == 40 for window in windows[:-1])
    assert len(joined) == (len(flat) if tokens == 10**6 else -(-tokens // 40) * 40)
    jsonl = tmp_path / "facts.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in facts.sentences()))
    assert list(Corpus(jsonl, tokens=tokens, window_tokens=40).windows(lm)) == windows


def test_a_window_is_no_longer_than_the_context(corpus_path: Path) -> None:
    lm = shared("gpt2")
    lengths = {len(row) for row in Corpus(corpus_path, tokens=512, window_tokens=4096).windows(lm)}
    assert lengths == {tiny.MAX_POSITIONS}


def test_text_sampled_from_the_model_is_seeded() -> None:
    lm, state = shared("llama"), torch.get_rng_state()
    first, same, other = (list(Corpus(None, tokens=300, window_tokens=50, seed=seed).windows(lm)) for seed in (0, 0, 1))
    assert first == same != other
    assert sum(map(len, first)) >= 300
    assert torch.equal(torch.get_rng_state(), state)


_BAD = {"missing.txt": None, "broken.jsonl": b'{"text": "a"}\n{"tex', "other.jsonl": b'{"prompt": "a"}\n'}
_BAD |= {"number.jsonl": b'{"text": 3}\n', "list.jsonl": b'["a"]\n', "latin.txt": "Näsström".encode("latin-1")}


@pytest.mark.parametrize("name", _BAD)
def test_a_corpus_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / name, _BAD[name]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EditError, match="cannot read the corpus") as caught:
        MomentStore(shared("gpt2"), Corpus(path), root=tmp_path / "cache").get(LAYERS)
    assert caught.value.where == str(path)
    assert not list(tmp_path.rglob("layer_*"))


def test_too_little_text_and_broken_weights(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="the corpus has 120 tokens, and keys of width 256 need more"):
        MomentStore(shared("gpt2"), replace(corpus, tokens=120), root=tmp_path).get(LAYERS)
    lm = fresh("gpt2")
    lm.model.transformer.h[1].mlp.c_fc.bias[3] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        MomentStore(lm, corpus, root=tmp_path).get((1,))
    assert not list(tmp_path.rglob("layer_*"))


# ------------------------------------------------------------------ interruption


class _Killed(Exception):
    pass


def _interrupted(store: MomentStore, after: int) -> None:
    """Compute until so many batches are done, then die."""
    calls: list[int] = []

    def progress(done: int, _total: int) -> None:
        calls.append(done)
        if len(calls) == after:
            raise _Killed

    store.progress = progress
    with pytest.raises(_Killed):
        store.get(LAYERS)


@pytest.mark.parametrize("sampled", [False, True], ids=["file", "sampled"])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_goes_on_after_an_interruption_with_equal_bits(
    after: int, sampled: bool, corpus: Corpus, tmp_path: Path
) -> None:
    lm = shared("gpt2")
    corpus = replace(corpus, path=None if sampled else corpus.path, tokens=1600)  # five batches of eight windows
    expected = MomentStore(lm, corpus, root=tmp_path / "whole").get(LAYERS)
    root = tmp_path / "cut"
    _interrupted(MomentStore(lm, corpus, root=root, save_every=2), after)
    assert not list(root.rglob("layer_*"))
    assert len(list(root.rglob("partial_*"))) == (after >= 2)
    steps: list[int] = []
    again = MomentStore(lm, corpus, root=root, save_every=2, progress=lambda done, _: steps.append(done))
    assert _same(again.get(LAYERS), expected)
    assert len(steps) == 5 - after // 2 * 2
    assert not list(root.rglob("partial_*"))


# ------------------------------------------------------------------ the cache


def _no_computing(*_: object, **__: object) -> None:
    raise AssertionError("computed again")


def test_is_found_again_by_content(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in another folder and the same text under another name are the same."""
    lm = shared("gpt2")
    expected = MomentStore(lm, corpus, root=tmp_path / "cache").get(LAYERS)
    lm.model.save_pretrained(tmp_path / "copy")
    lm.tokenizer.save_pretrained(tmp_path / "copy")
    other = load_model(tmp_path / "copy", device="cpu")
    moved = tmp_path / "moved.txt"
    moved.write_bytes(corpus.path.read_bytes())
    monkeypatch.setattr(moments, "accumulate", _no_computing)
    # Padding and cutting are settings of a call that a tokenizer remembers; they change no text here.
    other.tokenizer(["Oslo", "Oslo and Lima"], padding=True, truncation=True, max_length=9)
    store = MomentStore(other, replace(corpus, path=moved), root=tmp_path / "cache")
    assert store.missing(LAYERS) == []
    assert _same(store.get(LAYERS), expected)
    assert store.missing((0, 1, 2)) == [1]
    with pytest.raises(AssertionError, match="computed again"):
        store.get((1,))
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path))
    assert MomentStore(other, corpus).root == tmp_path / "moments"


def test_runs_side_by_side_compute_what_they_share_once(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, started, gathered = shared("llama"), Event(), []

    def slowly(*args: Any, **options: Any) -> Any:
        gathered.append(args[1])
        started.set()
        # The other one has asked for the same by now.
        time.sleep(0.3)
        return accumulate(*args, **options)

    monkeypatch.setattr(moments, "accumulate", slowly)
    stores = [MomentStore(lm, corpus, root=tmp_path) for _ in range(2)]
    with ThreadPoolExecutor() as threads:
        first = threads.submit(stores[0].get, (0,))
        assert started.wait(30)
        second = threads.submit(stores[1].get, LAYERS)
        assert torch.equal(first.result(60)[0].matrix, second.result(60)[0].matrix)
    # The second pass is over what the first has left.
    assert gathered == [[0], [2]]


def _other_tokenizer(lm: LanguageModel, corpus: Corpus) -> tuple[LanguageModel, Corpus]:
    return LanguageModel(lm.name, fresh("gpt2").model, shared("gemma2").tokenizer), corpus


def _other_text(lm: LanguageModel, corpus: Corpus) -> tuple[LanguageModel, Corpus]:
    path = corpus.path.with_name("other.txt")
    path.write_text("It rained.\n" + corpus.path.read_text())
    return lm, replace(corpus, path=path)


def _other_weights(_: LanguageModel, corpus: Corpus) -> tuple[LanguageModel, Corpus]:
    lm = fresh("gpt2")
    lm.model.transformer.h[0].mlp.c_proj.weight[0, 0] += 1e-3
    return lm, corpus


@pytest.mark.parametrize(
    "change",
    [
        _other_text,
        _other_weights,
        _other_tokenizer,
        lambda lm, corpus: (lm, replace(corpus, tokens=640)),
        lambda lm, corpus: (lm, replace(corpus, window_tokens=41)),
        lambda lm, corpus: (lm, replace(corpus, path=None)),
        lambda lm, corpus: (shared("gpt2", "bfloat16"), corpus),
    ],
    ids=["text", "weights", "tokenizer", "tokens", "window", "sampled", "dtype"],
)
def test_whatever_the_numbers_depend_on_has_an_entry_of_its_own(
    change: Callable[[LanguageModel, Corpus], tuple[LanguageModel, Corpus]], corpus: Corpus, tmp_path: Path
) -> None:
    store = MomentStore(shared("gpt2"), corpus, root=tmp_path)
    expected = store.get((1,))
    other = MomentStore(*change(shared("gpt2"), corpus), root=tmp_path)
    assert other.folder != store.folder
    assert other.missing((1,)) == [1]
    assert not _same(other.get((1,)), expected)
    assert MomentStore(shared("gpt2"), corpus, root=tmp_path).missing((1,)) == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 0x10
    path.write_bytes(content)


_DAMAGE = {
    "bit": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"no tensors at all" * 99),
    "other": lambda path: moments.save_tensors(path, {"something": torch.eye(256)}, {"tokens": 600, "batches": 2}),
}


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=list(_DAMAGE))
def test_a_damaged_file_is_named_and_never_used(
    damage: Callable[[Path], object], partial: bool, corpus: Corpus, tmp_path: Path
) -> None:
    lm = shared("gpt2")
    expected = MomentStore(lm, corpus, root=tmp_path / "whole").get(LAYERS)
    root = tmp_path / "cache"
    if partial:
        _interrupted(MomentStore(lm, corpus, root=root, save_every=1), after=2)
    else:
        MomentStore(lm, corpus, root=root).get(LAYERS)
    path = next(root.rglob("partial_*" if partial else "layer_002*"))
    assert load_file(path)
    damage(path)
    with pytest.raises(CacheError, match="damaged") as caught:
        MomentStore(lm, corpus, root=root).get(LAYERS)
    assert caught.value.where == str(path)
    assert "delete" in caught.value.fix
    path.unlink()
    assert _same(MomentStore(lm, corpus, root=root).get(LAYERS), expected)


def test_a_cache_that_cannot_be_written(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CacheError, match="cannot write") as caught:
        MomentStore(shared("gpt2"), corpus, root=tmp_path / "file" / "moments").get(LAYERS)
    assert caught.value.fix
    assert (tmp_path / "file").read_text() == "not a folder"


def test_what_is_cached_is_listed_and_what_is_damaged_is_said(corpus: Corpus, tmp_path: Path) -> None:
    lm = shared("gpt2")
    store = MomentStore(lm, corpus, root=tmp_path)
    store.get(LAYERS)
    expected = {"folder": store.folder.name, "model": lm.fingerprint[:12], "layers": [0, 2], "tokens": 600}
    assert describe_cached(tmp_path, safe_open) == [{**expected, "text": store.provenance["corpus"]["sha256"][:12]}]
    (store.folder / "layer_000.safetensors").write_bytes(b"junk")
    (row,) = describe_cached(tmp_path, safe_open)
    assert row["folder"] == store.folder.name
    assert row["text"].startswith("damaged: delete")
    assert describe_cached(tmp_path / "nowhere", safe_open) == []
