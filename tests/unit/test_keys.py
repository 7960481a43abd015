"""Keys, values and states against a slow reading: one prompt at a time, whole, through the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from everedit.edit import Edit
from everedit.engine.keys import LayerWalk, Reading, subject_keys, token_keys
from everedit.errors import EditError
from everedit.models import LanguageModel, load_model
from everedit.models.layout import oriented
from everedit.models.packaged import ALIASES
from everedit.patch import LowRank
from tests.support import facts
from tests.support.loading import DECODERS, bits, edit_of, fresh, hooks_left, same_bits, shared

# The last one is longer than the window of local attention.
PREFIXES = ["", facts.PREFIXES[0], facts.PREFIXES[1] + facts.PREFIXES[7] + facts.PREFIXES[4]]
EDITS = [edit_of(facts.facts()[index]) for index in (0, 40, 81, 97, 11)]
LAYERS = (0, 2, 3)

with_small_batches = pytest.mark.parametrize("budget", [4096, 40], ids=["one batch", "many batches"], indirect=True)


@pytest.fixture
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("everedit.engine.keys._TOKENS_A_BATCH", request.param)
    return int(request.param)


@contextmanager
def _untouched(lm: LanguageModel) -> Iterator[None]:
    before = bits(lm)
    yield
    assert same_bits(lm, before)
    assert hooks_left(lm) == []


@torch.no_grad()
def _seen(lm: LanguageModel, ids: tuple[int, ...], module: nn.Module) -> tuple[Tensor, Tensor]:
    """What goes into a module and what comes out of it, (tokens, width), with the bare text in the bare model."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        given = output[0] if isinstance(output, tuple) else output
        found.append((args[0].reshape(len(ids), -1), given.reshape(len(ids), -1)))

    handle = module.register_forward_hook(hook)
    lm.model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return found[0]


def _at_subject(lm: LanguageModel, edit: Edit, prefix: str, module: nn.Module) -> tuple[Tensor, Tensor]:
    """The same at the subject's last token, with the text behind it in place, target and all."""
    row = lm.encode(edit.prompt, edit.target_new, subject=edit.subject, prefix=prefix)
    taken, given = _seen(lm, row.ids, module)
    return taken[row.subject_last], given[row.subject_last]


def _close(found: Tensor, expected: Tensor) -> None:
    """Within a relative 1e-4, which random vectors or another token's could not be."""
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


# ------------------------------------------------------------------ keys


@with_small_batches
@pytest.mark.parametrize("family", DECODERS)
def test_subject_keys(family: str, budget: int) -> None:
    lm = shared(family)
    assert (len(LayerWalk(lm, EDITS, PREFIXES, 3)._parts) > 1) is (budget == 40)
    with _untouched(lm):
        for layer in LAYERS:
            keys = subject_keys(lm, EDITS, PREFIXES, layer)
            assert keys.shape == (len(EDITS), len(PREFIXES), lm.layout.inner_size)
            for edit, rows in zip(EDITS, keys, strict=True):
                for prefix, key in zip(PREFIXES, rows, strict=True):
                    _close(key, _at_subject(lm, edit, prefix, lm.layout.mlp_out(layer))[0])
        # A context does change the key: prefixes in a wrong order would not pass.
        assert float((keys[:, 0] - keys[:, 1]).norm()) > 1e-2 * float(keys[:, 0].norm())


@pytest.mark.parametrize("family", DECODERS)
def test_token_keys(family: str) -> None:
    """The inputs of any weight's module, at every token of prompt and target, edit after edit."""
    lm = shared(family)
    first, last = f"{lm.layout.family.blocks}.0", f"{lm.layout.family.blocks}.3"
    names = [lm.layout.mlp_out_weight(2), f"{last}.{lm.layout.family.attention_out}.weight"]
    names.append(f"{first}.{lm.layout.mlp_in_names[0]}.weight")
    with _untouched(lm):
        keys = token_keys(lm, EDITS, names)
        assert list(keys) == names
        for name in names:
            module = lm.layout.module_of(name)
            texts = [lm.encode(edit.prompt, edit.target_new).ids for edit in EDITS]
            assert len({len(ids) for ids in texts}) > 1
            _close(keys[name], torch.cat([_seen(lm, ids, module)[0] for ids in texts]).T)
            assert keys[name].shape[0] == oriented(module).shape[1]


def test_keys_are_float32_whatever_the_model_is() -> None:
    lm, whole = shared("llama", "bfloat16"), shared("llama")
    keys, expected = subject_keys(lm, EDITS, PREFIXES, 1), subject_keys(whole, EDITS, PREFIXES, 1)
    name = lm.layout.mlp_out_weight(1)
    reading = LayerWalk(lm, EDITS, PREFIXES, 2).read(1, {})
    found = (keys, token_keys(lm, EDITS, [name])[name], reading.keys, reading.mlp, reading.state)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert float((keys - expected).norm()) < 0.05 * float(expected.norm())


def test_an_edit_without_a_subject() -> None:
    edit = Edit(prompt="Mira Quell lives in", target_new="Oslo")
    for ask in (
        lambda: subject_keys(shared("gpt2"), [edit], [""], 1),
        lambda: LayerWalk(shared("gpt2"), [edit], [""], 1),
    ):
        with pytest.raises(EditError, match="the edit names none") as caught:
            ask()
        assert caught.value.where == edit.prompt


# ------------------------------------------------------------------ the walk


def _updates(lm: LanguageModel, layers: tuple[int, ...], rank: int = 3) -> dict[int, LowRank]:
    """Changes large enough to move every state behind them."""
    generator = torch.Generator().manual_seed(1)
    hidden, inner = lm.layout.hidden_size, lm.layout.inner_size
    return {
        layer: LowRank(
            0.2 * torch.randn(hidden, rank, generator=generator), 0.2 * torch.randn(inner, rank, generator=generator)
        )
        for layer in layers
    }


def _edited(family: str, updates: dict[int, LowRank]) -> LanguageModel:
    """A model whose weights really are changed."""
    lm = fresh(family)
    for layer, update in updates.items():
        oriented(lm.layout.mlp_out(layer)).add_(update.left @ update.right.T)
    return lm


def _agrees(found: Reading, lm: LanguageModel, edits: list[Edit], layer: int, last: int) -> None:
    assert found.keys.shape == (len(edits), len(PREFIXES), lm.layout.inner_size)
    assert found.mlp.shape == found.state.shape == (len(edits), lm.layout.hidden_size)
    for index, edit in enumerate(edits):
        for place, prefix in enumerate(PREFIXES):
            _close(found.keys[index, place], _at_subject(lm, edit, prefix, lm.layout.mlp_out(layer))[0])
        _close(found.mlp[index], _at_subject(lm, edit, "", lm.layout.mlp_out(layer))[1])
        _close(found.state[index], _at_subject(lm, edit, "", lm.layout.block(last))[1])


@with_small_batches
@pytest.mark.parametrize("family", DECODERS)
def test_a_walk_without_updates_reads_the_model(family: str, budget: int) -> None:
    lm = shared(family)
    with _untouched(lm):
        walk = LayerWalk(lm, EDITS, PREFIXES, 3)
        assert (len(walk._parts) > 1) is (budget == 40)
        for layer in LAYERS:
            _agrees(walk.read(layer, {}), lm, EDITS, layer, 3)


@with_small_batches
@pytest.mark.parametrize("family", DECODERS)
def test_a_walk_with_updates_reads_the_edited_model(family: str, budget: int) -> None:
    """As MEMIT walks: read a layer, add its update, read the next with all updates so far in place."""
    lm, updates = shared(family), _updates(shared(family), LAYERS)
    with _untouched(lm):
        walk, so_far = LayerWalk(lm, EDITS, PREFIXES, 3), {}
        bare = [LayerWalk(lm, EDITS, PREFIXES, 3).read(layer, {}) for layer in LAYERS]
        for layer, plain in zip(LAYERS, bare, strict=True):
            found = walk.read(layer, so_far)
            _agrees(found, _edited(family, so_far), EDITS, layer, 3)
            if so_far:
                assert float((found.keys - plain.keys).norm()) > 1e-2 * float(plain.keys.norm())
            so_far[layer] = updates[layer]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt", "gemma2"])
def test_a_walk_may_start_late_and_end_before_the_last_block(family: str) -> None:
    lm = shared(family)
    walk, updates = LayerWalk(lm, EDITS, PREFIXES, 2), _updates(lm, (1,))
    with _untouched(lm):
        _agrees(walk.read(1, {}), lm, EDITS, 1, 2)
        _agrees(walk.read(1, updates), _edited(family, updates), EDITS, 1, 2)
        _agrees(walk.read(2, updates), _edited(family, updates), EDITS, 2, 2)


def test_a_walk_runs_only_the_blocks_that_it_must() -> None:
    lm = shared("llama")
    ran: list[int] = []
    handles = [
        lm.layout.mlp_out(layer).register_forward_hook(lambda *_, at=layer: ran.append(at)) for layer in range(4)
    ]
    try:
        walk = LayerWalk(lm, EDITS, PREFIXES, 2)
        for layer, expected in ((0, [0, 1, 2]), (1, [0, 1, 2]), (2, [1, 2])):
            ran.clear()
            walk.read(layer, {})
            assert ran == expected
        ran.clear()
        subject_keys(lm, EDITS, PREFIXES, 1)
        assert ran == [0]
    finally:
        for handle in handles:
            handle.remove()


def test_one_edit_reads_the_same_alone_and_in_a_batch() -> None:
    lm = shared("qwen3")
    together = LayerWalk(lm, EDITS, PREFIXES, 3).read(2, {})
    for index, edit in enumerate(EDITS):
        alone = LayerWalk(lm, [edit], PREFIXES, 3).read(2, {})
        for part in ("keys", "mlp", "state"):
            _close(getattr(together, part)[index], getattr(alone, part)[0])


def test_nothing_is_left_when_a_walk_fails() -> None:
    lm = fresh("gpt2")
    with _untouched(lm):
        walk = LayerWalk(lm, EDITS, PREFIXES, 3)
        walk.read(1, {})
        with pytest.raises(RuntimeError):
            walk.read(2, {1: LowRank(torch.ones(3, 1), torch.ones(5, 1))})


@pytest.mark.real
@pytest.mark.skipif(not ALIASES["gemma3-270m"].is_installed, reason=ALIASES["gemma3-270m"].install)
def test_a_real_model() -> None:
    lm = load_model("gemma3-270m", device="cpu")
    edits = [
        Edit(prompt="The capital of France is", subject="France", target_new="Lyon"),
        Edit(prompt="Zoë Näsström was born in the town of", subject="Zoë Näsström", target_new="Oslo"),
    ]
    found = LayerWalk(lm, edits, PREFIXES, 3).read(2, {})
    _agrees(found, lm, edits, 2, 3)
    _close(subject_keys(lm, edits, PREFIXES, 2), found.keys)
