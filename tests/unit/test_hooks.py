"""Hooks: what they read is what a full forward says, what they skip does not run, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everedit.models import LanguageModel
from everedit.models.hooks import capture, changed_output, only_at, resumed_after, stopping_at
from tests.support import facts, tiny
from tests.support.loading import DECODERS, bits, fresh, same_bits

# Rows of different lengths, the longest longer than the window of local attention.
PROMPTS = (facts.facts()[0].prompt, facts.facts()[40].rephrase, facts.PREFIXES[1] + facts.facts()[80].prompt)


@cache
def _own(family: str) -> LanguageModel:
    """A model for this file alone: transformers leaves hooks of its own once it was asked for hidden states."""
    lm = fresh(family)
    _hidden_states(lm)
    return lm


every_family = pytest.mark.parametrize("lm", list(tiny.FAMILIES), indirect=True)
# T5's decoder blocks hand on their position biases as well: it cannot be resumed, and nothing asks for it.
decoders = pytest.mark.parametrize("lm", DECODERS, indirect=True)


@pytest.fixture
def lm(request: pytest.FixtureRequest) -> Iterator[LanguageModel]:
    """A family's model, which must come back with the same bits and the same hooks."""
    lm = _own(request.param)
    before, hooks = bits(lm), _hooks(lm)
    yield lm
    assert _hooks(lm) == hooks
    assert same_bits(lm, before)


def _hooks(lm: LanguageModel) -> dict[str, tuple[int, int, bool]]:
    return {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks), "forward" in module.__dict__)
        for name, module in lm.model.named_modules()
    }


def _inputs(lm: LanguageModel) -> dict[str, Any]:
    batch = lm.pad([lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS])
    assert int(batch.mask.sum()) < batch.mask.numel()
    if lm.layout.is_decoder_only:
        return batch.inputs()
    start = torch.full((len(batch), 1), lm.model.config.decoder_start_token_id)
    return {"input_ids": batch.ids, "attention_mask": batch.mask, "decoder_input_ids": torch.cat([start, batch.ids], 1)}


def _run(lm: LanguageModel, **more: Any) -> Any:
    with torch.no_grad():
        return lm.model.base_model(**_inputs(lm), use_cache=False, **more)


def _hidden_states(lm: LanguageModel) -> tuple[Tensor, ...]:
    """transformers' own list: what enters block 0, 1, ..., and the states behind the final norm."""
    out = _run(lm, output_hidden_states=True)
    return out.hidden_states if lm.layout.is_decoder_only else out.decoder_hidden_states


def _final(lm: LanguageModel) -> Tensor:
    """What the model comes to in the end: its last states, or logits where it keeps those to itself (T5)."""
    out = _run(lm)
    return out.last_hidden_state if lm.layout.is_decoder_only else out.logits


def _as_tuple(lm: LanguageModel) -> bool:
    kinds: list[bool] = []
    handle = lm.layout.block(0).register_forward_hook(lambda _m, _a, output: kinds.append(isinstance(output, tuple)))
    _run(lm)
    handle.remove()
    return kinds[0]


@contextmanager
def _counting(lm: LanguageModel) -> Iterator[dict[str, int]]:
    """Count how often each down projection runs, by a forward of its own and not by a hook."""
    counts: dict[str, int] = {}

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return forward(*args, **kwargs)

        return run

    parts: dict[str, nn.Module] = {f"mlp {layer}": lm.layout.mlp_out(layer) for layer in range(lm.layout.n_layers)}
    for name, module in parts.items():
        counts[name] = 0
        module.forward = counted(name, module.forward)
    try:
        yield counts
    finally:
        for module in parts.values():
            del module.forward


# ------------------------------------------------------------------ capture


@every_family
def test_captures_what_every_block_takes_and_gives(lm: LanguageModel) -> None:
    layers = range(lm.layout.n_layers)
    blocks = {layer: lm.layout.block(layer) for layer in layers}
    expected = _hidden_states(lm)
    assert len(expected) == lm.layout.n_layers + 1
    takes = {("in", layer): block for layer, block in blocks.items()}
    gives = {("out", layer): block for layer, block in blocks.items()}
    with capture(takes, gives, rows=len(PROMPTS)) as seen:
        _run(lm)
    assert len(seen) == 2 * lm.layout.n_layers
    for layer in layers:
        torch.testing.assert_close(seen["in", layer], expected[layer], rtol=0, atol=0)
        if layer + 1 in layers:  # the last entry is behind the final norm
            torch.testing.assert_close(seen["out", layer], expected[layer + 1], rtol=0, atol=0)
    norm = lm.model.get_submodule(lm.layout.family.final_norm)
    with torch.no_grad():
        torch.testing.assert_close(norm(seen["out", lm.layout.n_layers - 1]), expected[-1])


@every_family
def test_mlp_comes_in_rows_whatever_the_family_does_inside(lm: LanguageModel) -> None:
    """OPT runs its MLP on all tokens in a line; keys and values come as (rows, length, width) all the same."""
    batch = _hidden_states(lm)[0].shape[:2]
    out = lm.layout.mlp_out(1)
    with capture({"key": out}, {"value": out}, rows=batch[0]) as seen:
        _run(lm)
    assert seen["key"].shape == (*batch, lm.layout.inner_size)
    assert seen["value"].shape == (*batch, lm.layout.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(out(seen["key"]), seen["value"])


@every_family
def test_nothing_is_captured_before_a_run_or_after_the_block(lm: LanguageModel) -> None:
    with capture(outputs={"block": lm.layout.block(0)}, rows=len(PROMPTS)) as seen:
        assert seen == {}
    _run(lm)
    assert seen == {}


# ------------------------------------------------------------------ stopping


@every_family
@pytest.mark.parametrize("before", [False, True])
def test_stopping_skips_everything_behind(lm: LanguageModel, before: bool) -> None:
    expected, plain = _hidden_states(lm), _final(lm)
    last = lm.layout.mlp_out(1) if before else lm.layout.block(1)
    with _counting(lm) as counts:
        with capture({"in": lm.layout.block(1)}, rows=len(PROMPTS)) as seen, stopping_at(last, before=before):
            _run(lm)
            pytest.fail("the pass was not ended")
        ran = [layer for layer in range(lm.layout.n_layers) if counts[f"mlp {layer}"]]
    assert ran == ([0] if before else [0, 1])
    torch.testing.assert_close(seen["in"], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(_final(lm), plain, rtol=0, atol=0)


@every_family
def test_stopping_behind_a_capture_of_the_same_module(lm: LanguageModel) -> None:
    expected = _hidden_states(lm)
    block = lm.layout.block(1)
    with capture({"in": block}, {"out": block}, rows=len(PROMPTS)) as seen, stopping_at(block):
        _run(lm)
    torch.testing.assert_close(seen["in"], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(seen["out"], expected[2], rtol=0, atol=0)


@every_family
def test_a_stop_does_not_swallow_other_errors(lm: LanguageModel) -> None:
    with pytest.raises(ZeroDivisionError), stopping_at(lm.layout.block(0)):
        _ = 1 / 0


# ------------------------------------------------------------------ changing


@every_family
def test_changed_output_is_what_the_model_goes_on_with(lm: LanguageModel) -> None:
    """The down projection's output turned round is a down projection with its weight turned round."""
    plain, out = _final(lm), lm.layout.mlp_out(1)
    with changed_output(out, lambda _, output: -output):
        changed = _final(lm)
    originals = {name: weight.clone() for name, weight in out.named_parameters()}
    try:
        for weight in out.parameters():
            weight.neg_()
        expected = _final(lm)
    finally:
        for name, weight in out.named_parameters():
            weight.copy_(originals[name])
    torch.testing.assert_close(changed, expected)
    assert not torch.allclose(changed, plain, atol=1e-2)
    torch.testing.assert_close(_final(lm), plain, rtol=0, atol=0)


@every_family
def test_changed_block_output_and_its_input(lm: LanguageModel) -> None:
    """A block whose output becomes its input is no block: the next one takes what this one took."""
    first, second = lm.layout.block(1), lm.layout.block(2)
    with changed_output(first, lambda taken, _: taken), capture({1: first, 2: second}, rows=len(PROMPTS)) as seen:
        _run(lm)
    torch.testing.assert_close(seen[2], seen[1], rtol=0, atol=0)


@every_family
def test_a_capture_inside_of_a_change_sees_the_change(lm: LanguageModel) -> None:
    out = lm.layout.mlp_out(0)
    with changed_output(out, lambda _, output: output + 1), capture(outputs={"now": out}, rows=len(PROMPTS)) as seen:
        _run(lm)
    with capture(outputs={"plain": out}, rows=len(PROMPTS)) as before:
        _run(lm)
    torch.testing.assert_close(seen["now"], before["plain"] + 1)


# ------------------------------------------------------------------ resuming


@decoders
@pytest.mark.parametrize("skipped", [1, 2, "all"])
def test_resuming_gives_the_full_forward(lm: LanguageModel, skipped: int | str) -> None:
    n = lm.layout.n_layers if skipped == "all" else int(skipped)
    blocks = [lm.layout.block(layer) for layer in range(n)]
    with capture(outputs={"hidden": blocks[-1]}, rows=len(PROMPTS)) as seen:
        expected = _final(lm)
    as_tuple = _as_tuple(lm)
    with _counting(lm) as counts, resumed_after(blocks, seen["hidden"], as_tuple=as_tuple):
        found = _final(lm)
        assert [bool(count) for count in counts.values()] == [layer >= n for layer in range(lm.layout.n_layers)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with resumed_after(blocks, torch.zeros_like(seen["hidden"]), as_tuple=as_tuple):
        assert not torch.allclose(_final(lm), expected, atol=1e-2)
    torch.testing.assert_close(_final(lm), expected, rtol=0, atol=0)


@decoders
def test_a_model_knows_whether_its_blocks_return_tuples(lm: LanguageModel) -> None:
    assert lm.blocks_return_tuples is _as_tuple(lm)


@decoders
def test_resuming_keeps_a_forward_that_was_put_there_before(lm: LanguageModel) -> None:
    """Others hide a module's forward, too (accelerate's offloading does): theirs must be there again."""
    block = lm.layout.block(0)
    theirs = block.forward
    block.forward = theirs
    try:
        with resumed_after([block], torch.zeros(1), as_tuple=False):
            assert block.forward is not theirs
        assert block.__dict__.get("forward") is theirs
    finally:
        block.__dict__.pop("forward", None)


# ------------------------------------------------------------------ nothing left


class _Boom(Exception):
    pass


def _boom(*_: Any) -> Tensor:
    raise _Boom


@every_family
@pytest.mark.parametrize("where", ["body", "pass"])
def test_nothing_is_left_after_an_error(lm: LanguageModel, where: str) -> None:
    clean, plain, out = _hooks(lm), _final(lm), lm.layout.mlp_out(1)
    with pytest.raises(_Boom), ExitStack() as stack:  # noqa: PT012 - all four at once is the case
        if lm.layout.is_decoder_only:
            hidden = _hidden_states(lm)[1]
            stack.enter_context(resumed_after([lm.layout.block(0)], hidden, as_tuple=_as_tuple(lm)))
        stack.enter_context(capture({"in": out}, {"out": out}, rows=len(PROMPTS)))
        stack.enter_context(changed_output(out, _boom))
        stack.enter_context(stopping_at(lm.layout.block(1)))
        assert sum(clean[name] != now for name, now in _hooks(lm).items()) == 2 + lm.layout.is_decoder_only
        _boom() if where == "body" else _run(lm)
    assert _hooks(lm) == clean
    torch.testing.assert_close(_final(lm), plain, rtol=0, atol=0)


@decoders
def test_inputs_of_runs_no_further_than_its_deepest_module(lm: LanguageModel) -> None:
    """In whatever order the modules are named."""
    batch = lm.pad([lm.encode(prompt).ids for prompt in PROMPTS])
    modules = {layer: lm.layout.mlp_out(layer) for layer in (2, 0)}
    with capture(modules, rows=len(batch)) as expected:
        _run(lm)
    for named in (modules, dict(reversed(modules.items()))):
        with _counting(lm) as counts:
            found = lm.inputs_of(named, batch)
        assert [layer for layer in range(4) if counts[f"mlp {layer}"]] == [0, 1]
        assert found.keys() == modules.keys()
        for layer in modules:
            torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=0)


@decoders
def test_an_mlp_run_at_some_places_gives_the_same_there_and_nothing_elsewhere(lm: LanguageModel) -> None:
    last = lm.layout.n_layers - 1
    mlp = lm.layout.mlp(last)
    if mlp is None:
        assert lm.layout.family.mlp_out == "fc2"  # OPT's blocks have no module of their own for it
        return
    batch = lm.pad([[1, 2, 3, 4], [5, 6, 7]])
    places = torch.tensor([[False, True, False, True], [True, False, False, False]])
    with torch.no_grad():
        plain = lm.states(**batch.inputs())
        with only_at(mlp, places), capture(outputs={"mlp": mlp}, rows=2) as seen:
            found = lm.states(**batch.inputs())
    torch.testing.assert_close(found[places], plain[places])
    assert not torch.allclose(found[~places], plain[~places])
    assert seen["mlp"][~places].abs().sum() == 0 < seen["mlp"][places].abs().sum()
    assert "forward" not in mlp.__dict__
