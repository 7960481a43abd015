"""Read, replace and cut short what a model computes, with plain PyTorch hooks that always come off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["capture", "changed_output", "only_at", "replaced_input", "replaced_weight", "resumed_after", "stopping_at"]


class _Stop(Exception):
    """Ends a forward pass early; caught by :func:`stopping_at`."""


def _first(output: Any) -> Tensor:
    """A block's hidden state, whether it returns a tensor or a tuple that starts with it."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor)
    return tensor


@contextmanager
def capture(
    inputs: Mapping[Any, nn.Module] | None = None,
    outputs: Mapping[Any, nn.Module] | None = None,
    *,
    rows: int,
) -> Iterator[dict[Any, Tensor]]:
    """Collect what goes into and comes out of modules, under the given keys, as they ran last.

    Everything comes as (rows, length, width), also where a family runs its MLP on all tokens in a line (OPT).
    """
    seen: dict[Any, Tensor] = {}

    def in_rows(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (rows, -1)) if tensor.dim() == 2 else tensor

    def read_input(key: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[key] = in_rows(args[0] if args else kwargs["hidden_states"])

        return hook

    def read_output(key: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[key] = in_rows(_first(output))

        return hook

    with ExitStack() as stack:
        for key, module in (inputs or {}).items():
            stack.callback(module.register_forward_pre_hook(read_input(key), with_kwargs=True).remove)
        for key, module in (outputs or {}).items():
            stack.callback(module.register_forward_hook(read_output(key)).remove)
        yield seen


@contextmanager
def stopping_at(module: nn.Module, *, before: bool = False) -> Iterator[None]:
    """End any forward pass inside the block once ``module`` has run, or just ``before`` it runs.

    Enter it inside of :func:`capture`: hooks run in the order in which they were set, and this one ends the pass.
    """

    def stop(*_: Any) -> None:
        raise _Stop

    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(stop)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let ``change(input, output)`` stand in for the module's output."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = change(args[0], _first(output))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def resumed_after(blocks: list[nn.Module], hidden: Tensor, *, as_tuple: bool) -> Iterator[None]:
    """Skip ``blocks``, the first ones of a model, as if each of them had returned ``hidden``.

    The model's own code still makes the masks and the positions, so this holds for every family.
    ``as_tuple`` tells whether a block of this model returns a tuple.
    """

    def forward(*_: Any, **__: Any) -> Any:
        return (hidden, None) if as_tuple else hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_running(block, forward))
        yield


@contextmanager
def only_at(module: nn.Module, places: Tensor) -> Iterator[None]:
    """Run a module, which treats each position by itself, only at some ``places`` (rows, length); give 0 elsewhere.

    For the last block, where nobody reads the other positions any more.
    """
    theirs = module.forward

    def forward(hidden: Tensor) -> Tensor:
        found = theirs(hidden[places][None])[0]
        return hidden.new_zeros(hidden.shape).index_put(places.nonzero(as_tuple=True), found)

    with _running(module, forward):
        yield


@contextmanager
def replaced_input(module: nn.Module, tensor: Tensor, *, rows: slice = slice(None)) -> Iterator[None]:
    """Let ``tensor``, in whatever shape it comes, stand in for as many values of a module's input: for some of its
    ``rows``, or for all.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        theirs = args[0] if args else kwargs["hidden_states"]
        first, behind = rows.indices(len(theirs))[:2]
        mine = tensor.to(theirs.dtype).view_as(theirs[rows])
        mine = torch.cat([theirs[:first], mine, theirs[behind:]])
        return ((mine, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mine})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_weight(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let ``weight`` (d_out, d_in), which may want a gradient, stand in for a linear module's own."""

    def forward(inputs: Tensor) -> Tensor:
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        return F.linear(inputs, weight.to(inputs.dtype), bias)

    with _running(module, forward):
        yield


@contextmanager
def _running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` stand in for a module's own."""
    # An instance attribute hides the class's forward, and perhaps one that offloading put there before.
    theirs = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if theirs is None:
            del module.forward
        else:
            module.forward = theirs
