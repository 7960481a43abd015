"""Linear layers by oneDNN, which wastes less than PyTorch's own product of few rows on a CPU (docs/results/speed.md).

Most of that waste is rearranging the weight. :func:`direct` leaves the weight as it lies and gains a fifth to a third;
:func:`packed` lays out copies beforehand, for loops that use the same weights many times. Only x W^T of the forward
gains by a copy: for g W, the gradient of the input, the weight lies well. Weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from everedit.models.memory import give_back_memory

__all__ = ["direct", "packed"]


@contextmanager
def packed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the linear layers inside ``modules`` from laid-out copies of their weights while the block runs.

    Only float32 layers on a CPU whose torch has oneDNN; others stay as they are, with the same results. It costs
    the weights' memory once more. The weights must not change meanwhile.
    """
    with _replaced(modules, laid_out=True):
        yield
    give_back_memory()


@contextmanager
def direct(modules: Iterable[nn.Module]) -> Iterator[None]:
    """As :func:`packed`, without copies of the weights."""
    with _replaced(modules, laid_out=False):
        yield


@contextmanager
def _replaced(modules: Iterable[nn.Module], *, laid_out: bool) -> Iterator[None]:
    with ExitStack() as undo:
        if _available():
            for module in modules:
                for layer in module.modules():
                    if _suits(layer):
                        layer.forward = _forward_of(layer, laid_out)  # type: ignore[method-assign]
                        undo.callback(layer.__dict__.pop, "forward")
        yield


def _available() -> bool:
    operations = torch.ops.mkldnn
    wanted = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(operations, name) for name in wanted)


def _suits(layer: nn.Module) -> TypeIs[nn.Linear]:
    # A layer whose forward somebody replaced is left to them; so is every subclass, which may do more.
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    return weight.dtype == torch.float32 and not weight.requires_grad and weight.is_cpu


def _forward_of(layer: nn.Linear, laid_out: bool) -> Any:
    weight = layer.weight.detach()
    there = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None) if laid_out else weight
    return partial(_run, there=there, weight=weight, bias=layer.bias)


def _run(x: Tensor, there: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _Product.apply(x, there, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """x W^T + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _product(x, there, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(gradients[0], ctx.weight.t(), None), None, None, None


def _product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), laid_out, bias, "none", [], "")
