"""Facts kept as text, with an embedding each: found again by their meaning, whatever their number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.state import State

__all__ = ["Facts", "newest"]


def newest(edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits in their order, of several behind one prompt the last alone."""
    last = {_number(edit.prompt): place for place, edit in enumerate(edits)}
    return [edits[place] for place in sorted(last.values())]


@dataclass(frozen=True)
class Facts:
    """n facts: the UTF-8 ``text`` of all prompts and targets in a line, where each part ``ends`` (2 n,), and the
    embeddings (n, d). ``prompts`` (n,) tells prompts from each other: of two facts behind one prompt the newer stands.
    """

    text: Tensor
    ends: Tensor
    embeddings: Tensor
    prompts: Tensor

    @classmethod
    def none(cls, width: int, device: torch.device) -> Facts:
        """Return no facts."""
        text, ends = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
        return cls(text, ends, torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.long))

    @classmethod
    def of(cls, state: State) -> Facts | None:
        """Return the facts of a state; None if it has none."""
        tensors = state.tensors
        if not len(tensors.get("facts.embeddings", ())):
            return None
        text, ends, prompts = (tensors[f"facts.{name}"].cpu() for name in ("text", "ends", "prompts"))
        return cls(text, ends, tensors["facts.embeddings"], prompts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name, for a state."""
        parts = {"text": self.text, "ends": self.ends, "embeddings": self.embeddings, "prompts": self.prompts}
        return {f"facts.{name}": tensor for name, tensor in parts.items()}

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, index: int) -> tuple[str, str]:
        """Return a fact's prompt and target."""
        start = int(self.ends[2 * index - 1]) if index else 0
        middle, end = self.ends[2 * index : 2 * index + 2].tolist()
        return _decoded(self.text[start:middle]), _decoded(self.text[middle:end])

    def plus(self, edits: Sequence[Edit], embeddings: Tensor) -> Facts:
        """Return these facts and those of the :func:`newest` edits, which have ``embeddings`` (edits, d)."""
        prompts = torch.tensor([_number(edit.prompt) for edit in edits], dtype=torch.long)
        old = self._only(~torch.isin(self.prompts, prompts))
        parts = [part.encode() for edit in edits for part in (edit.prompt, edit.target_new)]
        begun = int(old.ends[-1]) if len(old.ends) else 0
        ends = begun + torch.tensor([len(part) for part in parts], dtype=torch.long).cumsum(0)
        fresh = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        # The device of the embeddings is where queries are compared.
        known = torch.cat([old.embeddings, embeddings.to(old.embeddings.device)])
        return Facts(
            torch.cat([old.text, fresh]), torch.cat([old.ends, ends]), known, torch.cat([old.prompts, prompts])
        )

    def _only(self, stays: Tensor) -> Facts:
        """Return the facts (n,) that stay."""
        if bool(stays.all()):
            return self
        lengths = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        both = stays.repeat_interleave(2)
        text = self.text[both.repeat_interleave(lengths)]
        return Facts(
            text, lengths[both].cumsum(0), self.embeddings[stays.to(self.embeddings.device)], self.prompts[stays]
        )

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest product and the number of its fact, (n,) each, for embedded ``queries`` (n, d)."""
        found = (queries.to(self.embeddings) @ self.embeddings.T).max(1)
        return found.values, found.indices


def _number(prompt: str) -> int:
    """Return a number of 63 bits for a prompt, its case and white space left out."""
    words = " ".join(prompt.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def _decoded(text: Tensor) -> str:
    return bytes(text.tolist()).decode()
