"""Facts kept as text, with an embedding each: found again by their meaning, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.state import State

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """n facts: the UTF-8 ``text`` of all prompts and targets in a line, where each part ``ends`` (2 n,), and the
    embeddings (n, d). Of two facts behind one prompt the newer one stands.
    """

    text: Tensor
    ends: Tensor
    embeddings: Tensor

    @classmethod
    def none(cls, width: int, device: torch.device) -> Facts:
        """Return no facts."""
        return cls(
            torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.long), torch.zeros(0, width).to(device)
        )

    @classmethod
    def of(cls, state: State) -> Facts | None:
        """Return the facts of a state; None if it has none."""
        tensors = state.tensors
        if "facts.text" not in tensors:
            return None
        return cls(tensors["facts.text"].cpu(), tensors["facts.ends"].cpu(), tensors["facts.embeddings"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name, for a state."""
        return {"facts.text": self.text, "facts.ends": self.ends, "facts.embeddings": self.embeddings}

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, index: int) -> tuple[str, str]:
        """Return a fact's prompt and target."""
        start = int(self.ends[2 * index - 1]) if index else 0
        middle, end = self.ends[2 * index : 2 * index + 2].tolist()
        return _decoded(self.text[start:middle]), _decoded(self.text[middle:end])

    def plus(self, edits: Sequence[Edit], embeddings: Tensor) -> Facts:
        """Return these facts and those of ``edits``, whose prompts have ``embeddings`` (edits, d)."""
        parts = [part.encode() for edit in edits for part in (edit.prompt, edit.target_new)]
        begun = int(self.ends[-1]) if len(self.ends) else 0
        ends = begun + torch.tensor([len(part) for part in parts], dtype=torch.long).cumsum(0)
        fresh = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        # The device of the embeddings is where queries are compared.
        known = torch.cat([self.embeddings, embeddings.to(self.embeddings.device)])
        return Facts(torch.cat([self.text, fresh]), torch.cat([self.ends, ends]), known)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest cosine and the number of its fact, (n,) each, for embedded ``queries`` (n, d).

        Of facts at one distance it is the newest.
        """
        # Two embeddings of one text may differ in their last bits.
        cosines = (queries.to(self.embeddings) @ self.embeddings.T).mul(1e6).round()
        found = cosines.flip(1).max(1)
        return found.values / 1e6, len(self) - 1 - found.indices


def _decoded(text: Tensor) -> str:
    return bytes(text.tolist()).decode()
