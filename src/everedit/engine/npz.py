"""Second moments in the form that ROME's and MEMIT's code keeps them: an npz file a layer, with a sum and a count.

The file's name begins with the module's, ``transformer.h.17.mlp.c_proj_float32_mom2_100000.npz``; inside stand
``mom2.mom2``, the sum of k k^T (D, D), and ``mom2.count``, how many keys were added up.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from everedit.cache import file_sha256
from everedit.engine.moments import MomentStore, SecondMoment
from everedit.errors import EditError
from everedit.models.layout import Layout

__all__ = ["import_moments", "layer_of"]


def layer_of(file: Path, layout: Layout) -> int:
    """Return the layer whose down projection a file is named after. Raises :class:`EditError` if it is none's."""
    modules = [layout.mlp_out_weight(layer).removesuffix(".weight") for layer in range(layout.n_layers)]
    for layer, module in enumerate(modules):
        if file.name.startswith((f"{module}_", f"{module}.npz")):
            return layer
    raise EditError(
        what="the file's name tells no layer of this model",
        where=str(file),
        fix=f"name it as ROME's code does ({modules[0]}_….npz for layer 0), or give --layer",
    )


def import_moments(store: MomentStore, files: Mapping[int, Path]) -> dict[int, Path]:
    """Put second moments into a store, from a file for each layer, and return where they are kept.

    Raises :class:`EditError` and keeps nothing if one is not of that form, or not of this model's size.
    """
    moments = {layer: _checked(store, layer, file) for layer, file in files.items()}
    sources = {layer: {"file": file.name, "sha256": file_sha256(file)} for layer, file in files.items()}
    return {layer: store.put(moment, sources[layer]) for layer, moment in moments.items()}


def _checked(store: MomentStore, layer: int, file: Path) -> SecondMoment:
    total, count = _read(file)
    size = store.lm.layout.inner_size
    if tuple(total.shape) != (size, size):
        raise _bad(file, f"its matrix is {' x '.join(map(str, total.shape))}, and keys here have {size} entries")
    if count < 1:
        raise _bad(file, f"it counts {count} keys")
    if not bool(torch.isfinite(total).all()):
        raise _bad(file, "it holds values that are not finite")
    if bool((total.diagonal() < 0).any()) or float((total - total.T).norm()) > 1e-3 * float(total.norm()):
        raise _bad(file, "its matrix is not a sum of k k^T, which is symmetric with no negative entry on the diagonal")
    return SecondMoment(layer, ((total + total.T) / 2 / count).to(store.lm.device), count)


def _read(file: Path) -> tuple[Tensor, int]:
    import numpy

    try:
        # A pickle inside, which the format allows for, is refused.
        with numpy.load(file, allow_pickle=False) as arrays:
            prefix = "mom2." if "mom2.mom2" in arrays else ""
            return torch.from_numpy(arrays[f"{prefix}mom2"]).double(), int(arrays[f"{prefix}count"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise _bad(file, str(error).strip("'")) from error


def _bad(file: Path, reason: str) -> EditError:
    return EditError(
        what=f"the file holds no second moments: {reason}",
        where=str(file),
        fix='give an npz file with "mom2.mom2" and "mom2.count", as ROME\'s layer_stats writes it',
    )
