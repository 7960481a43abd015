"""Tensors of a GGUF file: what each is called there, how its rows lie, and how it is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from everedit.errors import EvereditError, NotApplicable, NumericalError
from everedit.export.source import Source, owner
from everedit.models import LanguageModel
from everedit.models.layout import oriented

__all__ = ["Array", "Names", "Planned", "Weights", "load_gguf"]

Array = np.ndarray[Any, Any]


def load_gguf() -> Any:
    """Return the library gguf. Raises :class:`EvereditError` with the command that installs it."""
    try:
        import gguf
    except ImportError as error:
        raise EvereditError(
            what="GGUF files are written with the library gguf", fix="pip install 'everedit[export]'"
        ) from error
    return gguf


@dataclass(frozen=True)
class Planned:
    """A tensor to come: name, GGUF type, shape and numpy dtype as stored, and how it is made when its turn comes."""

    name: str
    type: Any
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], Array]

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * int(np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Names:
    """What a model's parameters are called in GGUF files of an ``architecture`` (``llama``, ``gemma3``, …)."""

    gguf: Any
    architecture: str
    lm: LanguageModel

    def __post_init__(self) -> None:
        if self.architecture not in self.gguf.MODEL_ARCH_NAMES.values():
            raise NotApplicable(what=f"the installed gguf library does not know the architecture '{self.architecture}'")

    @cached_property
    def _known(self) -> Any:
        kind = next(key for key, value in self.gguf.MODEL_ARCH_NAMES.items() if value == self.architecture)
        return self.gguf.get_tensor_name_map(kind, self.lm.layout.n_layers)

    def tensor(self, name: str) -> str | None:
        """Return a parameter's name in the file; None if it has none."""
        found: str | None = self._known.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight (d_out, …) with its rows in the order of the file.

        In files of the architecture llama the two halves that rotary positions turn together lie interleaved in each
        head's queries and keys; transformers keeps them apart.
        """
        module = name.rpartition(".")[0].rpartition(".")[2]
        if self.architecture != "llama" or module not in ("q_proj", "k_proj"):
            return weight
        config = self.lm.model.config
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@dataclass
class Weights:
    """The weights of the edited model as they are stored in a file; ``type`` is that of matrices.

    ``figures`` tells of every edited tensor that has been made its type, and how much of its change is lost by
    rounding, relative to the change.
    """

    gguf: Any
    source: Source
    lm: LanguageModel
    names: Names
    type: str
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def planned(self, tensor: str, name: str) -> Planned:
        """Plan the parameter ``name``, with its edits, as the file's ``tensor``."""
        shape = tuple(self._base(name).shape)
        kind = self._kind(shape)
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        stored = tuple(self.gguf.quant_shape_to_byte_shape(shape, kind)) if dtype is np.uint8 else shape
        return Planned(tensor, kind, stored, dtype, lambda: self._make(name, kind))

    def _kind(self, shape: tuple[int, ...]) -> Any:
        kinds = self.gguf.GGMLQuantizationType
        if len(shape) < 2:
            return kinds.F32
        wanted = kinds[self.type.upper()]
        # Quantised rows are made of whole blocks.
        return wanted if shape[-1] % self.gguf.GGML_QUANT_SIZES[wanted][0] == 0 else kinds.F16

    def _base(self, name: str) -> Tensor:
        return oriented(owner(self.lm, name)) if name.endswith(".weight") else self.lm.model.get_parameter(name).data

    def _make(self, name: str, kind: Any) -> Array:
        changed = name in self.source.change.deltas
        weight = self.source.edited(self.lm, name) if changed else self._base(name).float()
        array: Array = self.names.arranged(name, weight).contiguous().cpu().numpy()
        with np.errstate(over="ignore"):
            stored: Array = self.gguf.quants.quantize(array, kind)
        if kind.name == "F16" and not np.isfinite(stored).all():
            raise NumericalError(
                what="the weight does not fit into float16", where=name, fix="export with type=bf16 or type=f32"
            )
        if changed:
            lost = self.gguf.quants.dequantize(stored, kind).astype(np.float64) - array
            norm = self.source.change.deltas[name].norm()
            self.figures[name] = {"type": kind.name, "lost": float(np.linalg.norm(lost)) / norm if norm else 0.0}
        return stored
