"""Laid-out linear layers give what the plain ones give, in both directions, and are gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from everedit.models.packed import direct, packed
from tests.support.loading import bits, fresh, hooks_left, same_bits


@pytest.mark.parametrize("by", [packed, direct])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)])
def test_equals_the_plain_layer_and_its_gradient(rows: tuple[int, ...], bias: bool, by: Any) -> None:
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    x = torch.randn(*rows, 24, requires_grad=True)
    weight = torch.randn(*rows, 40)
    plain = layer(x)
    [slope] = torch.autograd.grad((plain * weight).sum(), x)
    with by([nn.Sequential(layer)]):
        assert "forward" in layer.__dict__
        fast = layer(x)
        [found] = torch.autograd.grad((fast * weight).sum(), x)
    assert "forward" not in layer.__dict__
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(found, slope)
    assert found.abs().sum() > 0


@pytest.mark.parametrize("by", [packed, direct])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_rounded_numbers_are_summed_in_float32(bias: bool, by: Any) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor makes no products of bfloat16")
    layer = nn.Linear(4096, 40, bias=bias).requires_grad_(False)
    x = torch.randn(33, 4096, requires_grad=True)
    weight = torch.randn(33, 40)

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().bfloat16().double()

    plain = rounded(x) @ rounded(layer.weight).T + (rounded(layer.bias) if bias else 0)
    slope = rounded(weight) @ rounded(layer.weight)
    with by([nn.Sequential(layer)], "bfloat16"):
        fast = layer(x)
        [found] = torch.autograd.grad((fast * weight).sum(), x)
    assert fast.dtype == found.dtype == torch.float32
    # Apart from the sums only the result is rounded, once, to eight bits.
    torch.testing.assert_close(fast.double(), plain, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(found.double(), slope, rtol=2**-8, atol=1e-4)
    assert not torch.equal(fast, layer(x))


@pytest.mark.parametrize("by", [packed, direct])
def test_layers_that_are_not_ours_to_change_stay_as_they_are(by: Any) -> None:
    half, trained, theirs = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4), nn.Linear(4, 4)
    half.requires_grad_(False)
    theirs.requires_grad_(False).forward = lambda x: x + 1  # type: ignore[method-assign,assignment]
    with by([nn.ModuleList([half, trained, theirs])]):
        assert "forward" not in half.__dict__
        assert "forward" not in trained.__dict__
        assert torch.equal(theirs(torch.zeros(4)), torch.ones(4))
    assert torch.equal(theirs(torch.zeros(4)), torch.ones(4))


def test_a_model_is_as_it_was_after_an_error() -> None:
    lm = fresh("llama")
    before = bits(lm)

    def fail() -> None:
        with packed([lm.layout.block(0)]):
            assert any("forward" in module.__dict__ for module in lm.layout.block(0).modules())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert hooks_left(lm) == []
    assert same_bits(lm, before)


def test_a_weight_changed_in_place_is_seen_at_once() -> None:
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    x = torch.randn(3, 6)
    with direct([nn.Sequential(layer)]):
        before = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
