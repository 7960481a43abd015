"""Second moments C = E[k k^T] of a layer's keys over ordinary text: one pass for all layers, cached, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from everedit.cache import cache_root, digest, held
from everedit.engine.corpus import Corpus
from everedit.engine.solve import Factor
from everedit.errors import CacheError, EditError, NumericalError
from everedit.models import LanguageModel
from everedit.patch import load_tensors, save_tensors

__all__ = ["Corpus", "MomentStore", "SecondMoment", "accumulate"]

Progress = Callable[[int, int], None]


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

        Raises :class:`CacheError` if a cached file is damaged, naming it, and :class:`EditError` if moments of other
        layers were imported and these were not.
        """
        if missing := self.missing(layers):
            self._require_text(missing)
            # Runs side by side want the same statistics at the same time: one computes, the others wait and read.
            with held(self.folder):
                if missing := self.missing(layers):
                    self._compute(missing)
        for layer in layers:
            if layer not in self._held:
                self._held[layer] = self._load(layer)
        return {layer: self._held[layer] for layer in layers}

    def put(self, moment: SecondMoment, source: Mapping[str, Any]) -> Path:
        """Keep a second moment that was gathered elsewhere; ``source`` says where it comes from. Returns its file."""
        info = {"tokens": moment.tokens, "layer": moment.layer, "source": dict(source), **self.provenance}
        save_tensors(self._path(moment.layer), {"mean": moment.matrix}, {**info, "sha256": _checksum(moment.matrix)})
        self._held.pop(moment.layer, None)
        return self._path(moment.layer)

    def _require_text(self, layers: Sequence[int]) -> None:
        name = self.corpus.imported
        if name is not None:
            raise EditError(
                what=f"no second moments of layer {', '.join(map(str, layers))} of this model were imported",
                where=f"stats.imported={name}",
                fix="import them (everedit stats import FILE.npz), or leave stats.imported out to gather them here",
            )

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
                "text": _text_of(text),
            }
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            row |= {"model": "?", "tokens": 0, "text": f"damaged: delete {folder}"}
        found.append(row)
    return found


def _text_of(corpus: dict[str, Any]) -> str:
    if "imported" in corpus:
        return f"imported: {corpus['imported']}"
    return str(corpus["sha256"])[:12] if "sha256" in corpus else "sampled from the model"
