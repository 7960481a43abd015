"""Linear layers by oneDNN, which wastes less than PyTorch's own product of few rows on a CPU (docs/results/speed.md).

Most of that waste is rearranging the weight. :func:`direct` leaves the weight as it lies and gains a fifth to a third;
:func:`packed` lays out copies beforehand, for loops that use the same weights many times. In float32 only x W^T of the
forward gains by a copy: for g W, the gradient of the input, the weight lies well. Weights get no gradient.

Products may be of numbers rounded to bfloat16 (``products``), summed in float32: processors with matrix units for them
(AMX) make several times as many. A product's result is rounded once too; between layers all is float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from everedit.models.memory import give_back_memory

__all__ = ["Products", "direct", "packed"]

Products = Literal["float32", "bfloat16"]
"""What the factors of a product, and its result, are rounded to."""


@contextmanager
def packed(modules: Iterable[nn.Module], products: Products = "float32") -> Iterator[None]:
    """Run the linear layers inside ``modules`` from laid-out copies of their weights while the block runs.

    Only float32 layers on a CPU whose torch has oneDNN, and with it products of the kind asked for; others stay as
    they are, with the same results up to rounding. It costs the weights' memory once more. The weights must not change
    meanwhile.
    """
    with _replaced(modules, products, laid_out=True):
        yield
    give_back_memory()


@contextmanager
def direct(modules: Iterable[nn.Module], products: Products = "float32") -> Iterator[None]:
    """As :func:`packed`, without copies of the weights."""
    with _replaced(modules, products, laid_out=False):
        yield


@contextmanager
def _replaced(modules: Iterable[nn.Module], products: Products, *, laid_out: bool) -> Iterator[None]:
    with ExitStack() as undo:
        if _available(products):
            for module in modules:
                for layer in module.modules():
                    if _suits(layer):
                        layer.forward = _forward_of(layer, products, laid_out)  # type: ignore[method-assign]
                        undo.callback(layer.__dict__.pop, "forward")
        yield


def _available(products: Products) -> bool:
    operations = torch.ops.mkldnn
    wanted = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(operations, name) for name in wanted):
        return False
    return products == "float32" or bool(operations._is_mkldnn_bf16_supported())


def _suits(layer: nn.Module) -> TypeIs[nn.Linear]:
    # A layer whose forward somebody replaced is left to them; so is every subclass, which may do more.
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    return weight.dtype == torch.float32 and not weight.requires_grad and weight.is_cpu


def _forward_of(layer: nn.Linear, products: Products, laid_out: bool) -> Any:
    weight, dtype = layer.weight.detach(), getattr(torch, products)
    there, back = weight, weight.t()
    if laid_out:
        there = _laid_out(weight, dtype)
        back = back if dtype == weight.dtype else _laid_out(back, dtype)
    return partial(_run, there=there, back=back, bias=layer.bias, dtype=dtype)


def _laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    there: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), None)
    return there


def _run(x: Tensor, there: Tensor, back: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out: Tensor = _Product.apply(x, there, back, bias, dtype)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """x W^T + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.back, ctx.dtype = back, dtype
        return _product(x, there, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _product(gradients[0], ctx.back, None, ctx.dtype), None, None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    made = torch.ops.mkldnn._linear_pointwise(x.to(dtype).contiguous(), weight.to(dtype), bias, "none", [], "")
    out: Tensor = made.to(x.dtype)
    return out
