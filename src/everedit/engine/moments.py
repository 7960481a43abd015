"""Second moments C = E[k k^T] of a layer's keys over ordinary text: one pass for all layers, cached, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from everedit.cache import cache_root, digest, file_sha256, held
from everedit.engine.solve import Factor
from everedit.errors import CacheError, EditError, NumericalError
from everedit.models import LanguageModel
from everedit.patch import load_tensors, save_tensors

__all__ = ["Corpus", "MomentStore", "SecondMoment", "accumulate"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """The text that statistics are gathered over, and how much of it.

    ``path`` is a text file (a document a paragraph) or JSONL with a ``text`` field; None means text sampled
    from the model itself. ``tokens`` is how many tokens to read, in windows of ``window_tokens``.
    """

    path: Path | None = None
    tokens: int = 8_192
    window_tokens: int = 512
    seed: int = 0

    def provenance(self) -> dict[str, Any]:
        """Return what tells this text from any other."""
        if self.path is None:
            source: dict[str, Any] = {"sampled_from_the_model": self.seed}
        else:
            with _readable(self.path):
                source = {"sha256": file_sha256(self.path)}
        return {**source, "tokens": self.tokens, "window_tokens": self.window_tokens}

    def windows(self, lm: LanguageModel) -> Iterator[list[int]]:
        """Yield rows of ``window_tokens`` ids, documents joined by the end token, until ``tokens`` are out.

        A model with a shorter context gets windows of that length.
        """
        rows = _sampled(lm, self) if self.path is None else _read(lm, self.path)
        end, left = lm.tokenizer.eos_token_id, self.tokens
        held: list[int] = []
        window = min(self.window_tokens, lm.context_tokens)
        for row in rows:
            held += [*row, end] if end is not None else row
            while len(held) >= window and left > 0:
                yield held[:window]
                held, left = held[window:], left - window
            if left <= 0:
                return
        if held:
            yield held


def _read(lm: LanguageModel, path: Path) -> Iterator[list[int]]:
    with _readable(path), path.open(encoding="utf-8") as stream:
        for line in stream:
            text = (json.loads(line)["text"] if path.suffix == ".jsonl" else line).strip()
            if text:
                yield lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of any failure to read a corpus that it is the corpus that cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EditError(
            what=f"cannot read the corpus: {error!r}",
            where=str(path),
            fix='give a text file, or JSONL with "text"',
        ) from error


def _sampled(lm: LanguageModel, corpus: Corpus) -> Iterator[list[int]]:
    """Sample texts from the model at temperature 1, many rows at a time."""
    seed = corpus.seed
    start = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.pad_id
    words = [row for word in _OPENINGS if (row := list(lm.encode(word).ids))]
    room = lm.context_tokens - max(map(len, words), default=1)
    # Few tokens come as many short texts, since a step costs about the same for one row as for all.
    rows = 64
    length = min(128, max(32, -(-corpus.tokens // rows)), corpus.window_tokens, room)
    while True:
        begin = [words[(seed * rows + index) % len(words)] or [start] for index in range(rows)]
        # No text ends before its length: the rows that go on would be computed for less.
        sampled = lm.generate_ids(begin, max_new_tokens=length, min_new_tokens=length, top_k=0, seed=seed)
        for prompt, new in zip(begin, sampled, strict=True):
            yield [*prompt, *new]
        seed += 1


_OPENINGS = (
    "The", "In", "A", "When", "It was", "She", "He", "They", "This", "After", "During", "As", "For", "On", "At",
    "Although", "Many", "One", "There", "We", "You", "If", "What is", "How", "Who", "Where", "My", "Our", "New",
    "First", "With", "By", "Some", "People", "Scientists", "The city", "The company", "The river", "The book",
    "The history of", "A long time ago", "Yesterday", "Today", "In 1912", "According to", "Because", "Its", "From",
)  # fmt: skip


@dataclass
class SecondMoment:
    """C of one layer: ``matrix`` (D, D) float64, the mean over ``tokens`` tokens."""

    layer: int
    matrix: Tensor
    tokens: int
    ridge: float = 1e-5

    @cached_property
    def factor(self) -> Factor:
        """Cholesky factor of C with a tiny ridge, which a short corpus needs and a long one does not feel."""
        return Factor.of(self.matrix, self.ridge)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of C in ascending order and eigenvectors as columns, float64."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors


def accumulate(
    lm: LanguageModel,
    layers: Sequence[int],
    windows: Iterator[list[int]],
    *,
    batch_rows: int = 8,
    sums: dict[int, Tensor] | None = None,
    seen: int = 0,
    after_batch: Callable[[dict[int, Tensor], int], None] | None = None,
) -> tuple[dict[int, Tensor], int]:
    """Return the sums of k k^T (D, D) of each layer and the tokens seen, in one pass over ``windows``.

    The forward stops at the deepest layer's key. Products are float32 a batch, sums float64. ``sums`` and
    ``seen`` carry on from an earlier part; ``after_batch`` sees the state after each batch.
    """
    wanted = sorted(set(layers))
    modules = {layer: lm.layout.mlp_out(layer) for layer in wanted}
    size = lm.layout.inner_size
    total = sums or {layer: torch.zeros(size, size, dtype=torch.float64, device=lm.device) for layer in wanted}
    while rows := [row for _, row in zip(range(batch_rows), windows, strict=False)]:
        batch = lm.pad(rows)
        keys_of = lm.inputs_of(modules, batch)
        real = None if all(len(row) == len(rows[0]) for row in rows) else batch.mask.bool()
        for layer in wanted:
            keys = keys_of[layer].flatten(0, 1) if real is None else keys_of[layer][real]
            keys = keys.float()
            total[layer] += keys.T @ keys
        seen += int(batch.mask.sum())
        if after_batch:
            after_batch(total, seen)
    return total, seen


@dataclass
class MomentStore:
    """Second moments of one model, by layer: from memory, from the cache, or computed over ``corpus``.

    The cache key is the full provenance: the model's fingerprint, its tokenizer, the text, window, number of
    tokens and dtype. An interrupted computation goes on where it stopped.
    """

    lm: LanguageModel
    corpus: Corpus = field(default_factory=Corpus)
    root: Path | None = None
    progress: Progress | None = None
    save_every: int = 8

    def __post_init__(self) -> None:
        self._held: dict[int, SecondMoment] = {}
        self.root = self.root or cache_root() / "moments"

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Everything that the numbers depend on, except the layer. Asked for before the first edit."""
        return {
            "model": self.lm.fingerprint,
            "tokenizer": hashlib.sha256(_rules(self.lm).encode()).hexdigest(),
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "corpus": self.corpus.provenance(),
        }

    @property
    def folder(self) -> Path:
        """Where this model's moments over this corpus are cached."""
        assert self.root is not None
        return self.root / digest(self.provenance)

    def missing(self, layers: Sequence[int]) -> list[int]:
        """Return the layers that would have to be computed, in ascending order."""
        return sorted({layer for layer in layers if layer not in self._held and not self._path(layer).exists()})

    def get(self, layers: Sequence[int]) -> dict[int, SecondMoment]:
        """Return the second moments of ``layers``, computing in one pass those that are not cached.

        Raises :class:`CacheError` if a cached file is damaged, naming it.
        """
        if self.missing(layers):
            # Runs side by side want the same statistics at the same time: one computes, the others wait and read.
            with held(self.folder):
                if missing := self.missing(layers):
                    self._compute(missing)
        for layer in layers:
            if layer not in self._held:
                self._held[layer] = self._load(layer)
        return {layer: self._held[layer] for layer in layers}

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:03d}.safetensors"

    def _load(self, layer: int) -> SecondMoment:
        tensors, info = self._read(self._path(layer), ["mean"])
        return SecondMoment(layer, tensors["mean"].to(self.lm.device), int(info["tokens"]))

    def _read(self, path: Path, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a file's matrices. Raises :class:`CacheError` unless they are those that were written."""
        tensors, info = load_tensors(path)
        if sorted(tensors) != sorted(names) or info.get("sha256") != _checksum(*(tensors[name] for name in names)):
            raise CacheError(
                what="these cached second moments are damaged",
                where=str(path),
                fix=f"delete the file and run again: rm '{path}'",
            )
        return tensors, info

    def _compute(self, layers: list[int]) -> None:
        partial = self.folder / f"partial_{digest(layers, 8)}.safetensors"
        sums, seen, batches = None, 0, 0
        if partial.exists():
            tensors, info = self._read(partial, [str(layer) for layer in layers])
            sums = {layer: tensors[str(layer)].to(self.lm.device) for layer in layers}
            seen, batches = int(info["tokens"]), int(info["batches"])
        rows = 8
        windows = self.corpus.windows(self.lm)
        for _ in range(batches * rows):
            next(windows, None)
        done = batches

        def after_batch(total: dict[int, Tensor], tokens: int) -> None:
            nonlocal done
            done += 1
            if done % self.save_every == 0:
                state = {str(layer): total[layer] for layer in layers}
                save_tensors(partial, state, {"tokens": tokens, "batches": done, "sha256": _checksum(*state.values())})
            if self.progress:
                self.progress(tokens, self.corpus.tokens)

        total, seen = accumulate(
            self.lm, layers, windows, batch_rows=rows, sums=sums, seen=seen, after_batch=after_batch
        )
        if seen <= self.lm.layout.inner_size:
            raise NumericalError(
                what=f"the corpus has {seen} tokens, and keys of width {self.lm.layout.inner_size} need more",
                where=str(self.corpus.path or "text sampled from the model"),
                fix="give more text or raise the number of tokens (stats.tokens)",
            )
        for layer, matrix in total.items():
            mean = matrix / seen
            if not bool(torch.isfinite(mean).all()):
                raise NumericalError(what="the second moments are not finite", where=f"layer {layer}")
            info = {"tokens": seen, "layer": layer, "sha256": _checksum(mean), **self.provenance}
            save_tensors(self._path(layer), {"mean": mean}, info)
        partial.unlink(missing_ok=True)


def _rules(lm: LanguageModel) -> str:
    """What a tokenizer does to a text: all of its settings but the padding and cutting of the latest call."""
    backend = getattr(lm.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(sorted(lm.tokenizer.get_vocab().items()))
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str()


def _checksum(*matrices: Tensor) -> str:
    hasher = hashlib.sha256()
    for matrix in matrices:
        hasher.update(matrix.cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def describe_cached(root: Path, open_file: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return what is cached under ``root``: folder, model, layers, tokens and text, read from the files' headers."""
    found = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        files = sorted(folder.glob("layer_*.safetensors"))
        if not files:
            continue
        row: dict[str, Any] = {
            "folder": folder.name,
            "layers": [int(file.stem.removeprefix("layer_")) for file in files],
        }
        try:
            with open_file(files[0], framework="pt") as file:
                info = json.loads(file.metadata()["info"])
            text = info["corpus"]
            row |= {
                "model": info["model"][:12],
                "tokens": info["tokens"],
                "text": text["sha256"][:12] if "sha256" in text else "sampled from the model",
            }
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            row |= {"model": "?", "tokens": 0, "text": f"damaged: delete {folder}"}
        found.append(row)
    return found
