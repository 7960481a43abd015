"""A GGUF file of the unedited model as the beginning of one of the edited model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everedit.errors import ModelError
from everedit.export.gguf_tensors import Array, Names, Planned, Weights
from everedit.export.source import owner
from everedit.models import LanguageModel
from everedit.models.layout import oriented

__all__ = ["Begun"]

# How far quantised weights may lie from the model's own, relative to their norm.
_SLACK = {"Q8_0": 0.02, "Q6_K": 0.05, "Q5_0": 0.1, "Q5_1": 0.1, "Q5_K": 0.1}
_SLACK_OF_FEWER_BITS = 0.5
_WRITTEN_ANEW = ("GGUF.", "general.architecture", "everedit.")


class Begun:
    """The file at ``path``, which must be of the unedited model ``lm``. Raises :class:`ModelError` if it is not."""

    def __init__(self, gguf: Any, lm: LanguageModel, path: Path) -> None:
        self._gguf, self._path = gguf, path
        try:
            self._reader = gguf.GGUFReader(path)
            architecture = str(self._reader.get_field("general.architecture").contents())
        except (OSError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise ModelError(
                what=f"the file is no GGUF file that can be read: {error}", where=str(path), fix="give another start"
            ) from error
        self.names = Names(gguf, architecture, lm)
        self._by_name = {tensor.name: tensor for tensor in self._reader.tensors}
        self._require_norms(lm)

    def describe(self, writer: Any) -> None:
        """Copy what the file says of itself."""
        for field in self._reader.fields.values():
            kind = field.types[0]
            if field.name == "general.alignment":
                writer.add_custom_alignment(int(field.contents()))
            elif not field.name.startswith(_WRITTEN_ANEW):
                inner = field.types[-1] if kind == self._gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)

    def plan(self, weights: Weights) -> Iterator[Planned]:
        """Yield the file's tensors in their order: as they are, or made anew where they were edited."""
        edited = {self._tensor_of(name): name for name in weights.source.change.deltas}
        for tensor, name in edited.items():
            self._require_same(weights.lm, tensor, name)
        for tensor in self._reader.tensors:
            if tensor.name in edited:
                yield weights.planned(tensor.name, edited[tensor.name])
            else:
                data: Array = tensor.data
                yield Planned(tensor.name, tensor.tensor_type, data.shape, data.dtype, partial(np.asarray, data))

    def _tensor_of(self, name: str) -> str:
        tensor = self.names.tensor(name)
        if tensor is None or tensor not in self._by_name:
            raise self._foreign(f"it holds no tensor for '{name}'")
        return tensor

    def _values(self, tensor: str) -> torch.Tensor:
        found = self._by_name[tensor]
        return torch.from_numpy(np.array(self._gguf.quants.dequantize(found.data, found.tensor_type)))

    def _require_same(self, lm: LanguageModel, tensor: str, name: str) -> None:
        """A tensor that is replaced must have held the weight that was edited, up to its quantisation."""
        ours = self.names.arranged(name, oriented(owner(lm, name))).double().cpu()
        kind = self._by_name[tensor].tensor_type.name
        exact = float(torch.finfo(lm.dtype).eps) + (1e-3 if kind == "F16" else 8e-3 if kind == "BF16" else 0)
        slack = exact if kind in ("F32", "F16", "BF16") else _SLACK.get(kind, _SLACK_OF_FEWER_BITS)
        theirs = self._values(tensor).double()
        if theirs.shape != ours.shape or not float((theirs - ours).norm()) <= slack * float(ours.norm()):
            raise self._foreign(f"its tensor {tensor} is not the model's '{name}'")

    def _require_norms(self, lm: LanguageModel) -> None:
        """Norms are never quantised, and training changes them: they tell a model from its relatives."""
        for name, weight in lm.model.named_parameters():
            tensor = self.names.tensor(name) if weight.dim() == 1 and "norm" in name else None
            if tensor is not None and tensor in self._by_name and self._by_name[tensor].tensor_type.name == "F32":
                theirs, ours = self._values(tensor).to(weight.device), weight.float()
                slack = 4 * float(torch.finfo(weight.dtype).eps)
                # Some files hold 1 + w, as it is applied.
                if not any(torch.allclose(theirs, ours + one, rtol=slack, atol=slack) for one in (0, 1)):
                    raise self._foreign(f"its tensor {tensor} is not the model's '{name}'")

    def _foreign(self, what: str) -> ModelError:
        return ModelError(
            what=f"the file is not one of the unedited model: {what}",
            where=str(self._path),
            fix="give a GGUF file of the very model that was edited, or leave start out",
        )
