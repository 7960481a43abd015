"""Other ways to ask for what a prompt asks for: those nearest to it in the map of :mod:`everedit.engine.relation`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["Wordings"]


class Wordings:
    """Texts with {} in a subject's place, by their ``keys`` (n, p) of length 1; None stands for a text of no use."""

    def __init__(self, texts: Sequence[str | None], keys: Tensor) -> None:
        first: dict[str, int] = {}
        for number, text in enumerate(texts):
            if text is not None:
                first.setdefault(text.casefold(), number)
        numbers = list(first.values())
        self._texts = [text for number in numbers if (text := texts[number]) is not None]
        self._keys = keys[numbers]

    def near(self, key: Tensor, count: int, besides: str | None = None) -> list[str]:
        """Return the ``count`` texts most like ``key`` (p,), the most like first, without that of ``besides``.

        They need not ask for the same thing: of a relation that nobody wrote down, they are what comes nearest.
        """
        ranked = (self._keys @ key.to(self._keys)).argsort(descending=True, stable=True).tolist()
        own = None if besides is None else besides.casefold()
        others = (self._texts[number] for number in ranked if self._texts[number].casefold() != own)
        return [text for _, text in zip(range(count), others, strict=False)]
