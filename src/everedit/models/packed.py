"""Linear layers over weights laid out for the matrix product once, for loops that use the same weights many times.

On a CPU a product of few rows spends much of its time rearranging the weight; oneDNN can do that beforehand.
Only x W^T of the forward gains by it: g W, the gradient of the input, reads the weight as it lies. Weights get none.
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

__all__ = ["packed"]


@contextmanager
def packed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the linear layers inside ``modules`` from laid-out copies of their weights while the block runs.

    Only float32 layers on a CPU whose torch has oneDNN; others stay as they are, with the same results. It costs
    the weights' memory once more. The weights must not change meanwhile.
    """
    with ExitStack() as undo:
        if _available():
            for module in modules:
                for layer in module.modules():
                    if _packs(layer):
                        layer.forward = _forward_of(layer)  # type: ignore[method-assign]
                        undo.callback(layer.__dict__.pop, "forward")
        try:
            yield
        finally:
            undo.close()
            give_back_memory()


def _available() -> bool:
    operations = torch.ops.mkldnn
    wanted = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(operations, name) for name in wanted)


def _packs(layer: nn.Module) -> TypeIs[nn.Linear]:
    # A layer whose forward somebody replaced is left to them; so is every subclass, which may do more.
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    return weight.dtype == torch.float32 and not weight.requires_grad and weight.is_cpu


def _forward_of(layer: nn.Linear) -> Any:
    weight = layer.weight.detach()
    there = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
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
        return gradients[0] @ ctx.weight, None, None, None


def _product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), laid_out, bias, "none", [], "")
