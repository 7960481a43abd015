"""Memories beside the weights: modules around a layer's MLP, or another way to meet a prompt, put on and taken off.

What a memory does is a function of the method's state alone, so that a stream is saved, loaded, tried and taken back
with its state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor, nn

from everedit.models import LanguageModel
from everedit.models.calls import Call, watching
from everedit.models.hooks import changed_output
from everedit.models.model import Speaker

__all__ = ["Attached", "LayerMemory", "Memory", "PromptMemory", "changed_mlp"]


class Memory(ABC):
    """Something that stands beside the weights of a model while it is attached."""

    @abstractmethod
    def attached(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """Return a context in which the memory is part of the model."""


class LayerMemory(Memory):
    """A memory around the MLP of one ``layer``."""

    layer: int

    @abstractmethod
    def change(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what shall stand in for the MLP's output ``value`` (rows, length, H).

        ``query`` (rows, length, H) is the MLP's input, ``key`` (rows, length, D) the down projection's.
        """

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[None]:
        """Put the memory around its layer's MLP."""
        with watching(lm) as watcher:

            def change(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return self.change(watcher.now, query, key, value)

            with changed_mlp(lm, self.layer, change, lambda: watcher.now.real.shape):
                yield


class PromptMemory(Memory):
    """A memory that meets prompts in the model's place: it rewrites them, or sends them to another model."""

    @abstractmethod
    def speakers(self, lm: LanguageModel, prompts: Sequence[str], room: Sequence[int]) -> list[Speaker]:
        """Return what answers each prompt, with ``room`` tokens to come behind it."""

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[None]:
        """Let the memory say what answers each prompt."""
        before = lm.redirect
        lm.redirect = lambda prompts, room: self.speakers(lm, prompts, room)
        try:
            yield
        finally:
            lm.redirect = before


@contextmanager
def changed_mlp(
    lm: LanguageModel,
    layer: int,
    change: Callable[[Tensor, Tensor, Tensor], Tensor],
    shape: Callable[[], tuple[int, ...]],
) -> Iterator[None]:
    """Let ``change(query, key, value)`` stand in for an MLP's output while the block runs.

    It sees the MLP's input (rows, length, H), the down projection's (rows, length, D) and its output (rows, length, H).
    ``shape()`` is the pass's (rows, length): some families run the MLP on all tokens in a line.
    """
    latest: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        latest[:] = [args[0]]

    def changed(key: Tensor, value: Tensor) -> Tensor:
        whole = (*shape(), -1)
        return change(latest[0].view(whole), key.view(whole), value.view(whole)).view_as(value)

    handle = lm.layout.mlp_in(layer).register_forward_pre_hook(keep)
    try:
        with changed_output(lm.layout.mlp_out(layer), changed):
            yield
    finally:
        handle.remove()


class Attached:
    """The memory that a model has at the moment, if any."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._memory: Memory | None = None
        self._on = ExitStack()

    def put(self, memory: Memory | None) -> None:
        """Let ``memory`` stand beside the model in place of what stood there."""
        self._on.close()
        self._memory = memory
        if memory is not None:
            self._on.enter_context(memory.attached(self.lm))

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Take the memory off while the block runs; blocks may be nested."""
        memory = self._memory
        self.put(None)
        try:
            yield
        finally:
            self.put(memory)
