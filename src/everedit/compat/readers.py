"""What reads single hyper-parameters: each returns our value, or raises ``ValueError`` that says what is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "choice", "count", "flag", "folder", "half", "layer", "layer_of_module", "layers", "layers_of_modules", "modules",
    "names_at_the_end", "number", "pairs", "positive", "source", "text",
]  # fmt: skip

Place = str
_PROJECTIONS: Mapping[str, Place] = {
    "gate_proj": "mlp_gate", "up_proj": "mlp_up",
    "down_proj": "mlp_out", "c_proj": "mlp_out", "fc_out": "mlp_out", "dense_4h_to_h": "mlp_out", "fc2": "mlp_out",
    "c_fc": "mlp_in", "fc_in": "mlp_in", "dense_h_to_4h": "mlp_in", "fc1": "mlp_in",
}  # fmt: skip


def number(value: Any) -> float:
    """Return a number, which may be written ``5e-1``: YAML takes that for a text."""
    try:
        if isinstance(value, (bool, type(None))):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("a number") from None


def positive(value: Any) -> float | None:
    """Return a number above 0, or None where it is switched off (False, None or 0)."""
    if value is None or value is False:
        return None
    found = number(value)
    if found < 0:
        raise ValueError("a number above 0, or false")
    return found or None


def count(value: Any) -> int:
    """Return a whole number."""
    try:
        found = number(value)
    except ValueError:
        found = 0.5
    if found != int(found):
        raise ValueError("a whole number")
    return int(found)


def flag(value: Any) -> bool:
    """Return True or False."""
    if value not in (True, False):
        raise ValueError("true or false")
    return bool(value)


def text(value: Any) -> str:
    """Return a text."""
    if not isinstance(value, str) or not value:
        raise ValueError("a name")
    return value


def source(value: Any) -> str:
    """Return the name of a model, which may be a loaded pair of model and tokenizer."""
    if isinstance(value, tuple) and len(value) == 2:
        return str(getattr(value[0], "name_or_path", "") or type(value[0]).__name__)
    if not isinstance(value, str) or not value:
        raise ValueError("an alias (everedit models ls), a folder, a hub id, or a loaded (model, tokenizer)")
    return value


def half(name: str) -> Callable[[Any], str | None]:
    """Return a reader of a switch to half precision, the dtype ``name``."""
    return lambda value: name if flag(value) else None


def choice(names: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """Return a reader of one of several values."""

    def read(value: Any) -> Any:
        if value not in names:
            raise ValueError(" or ".join(map(str, names)))
        return names[value]

    return read


def layers(value: Any) -> list[int]:
    """Return layers, of which there is at least one."""
    found = value if isinstance(value, (list, tuple)) else [value]
    if not found:
        raise ValueError("a list of layers, such as [4, 5, 6]")
    try:
        return [count(item) for item in found]
    except ValueError:
        raise ValueError("a list of layers, such as [4, 5, 6]") from None


def layer(value: Any) -> int:
    """Return the one layer of a list."""
    found = layers(value)
    if len(found) != 1:
        raise ValueError("a list of one layer, such as [5]")
    return found[0]


def pairs(value: Any) -> list[list[int]]:
    """Return pairs of whole numbers."""
    try:
        return [[count(first), count(second)] for first, second in value]
    except (TypeError, ValueError):
        raise ValueError("pairs of (tokens, how many), such as [[5, 10], [10, 10]]") from None


def layers_of_modules(value: Any) -> list[int] | None:
    """Return the layers in modules' names (``model.layers.29.mlp.up_proj.weight``, ``transformer.h[35].mlp.c_fc``).

    Of an encoder-decoder the decoder's count; an empty list names none.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of names of modules, such as [model.layers.27.mlp.down_proj.weight]")
    names = [name for name in value if "decoder." in name] or list(value)
    found = [re.search(r"[.\[](\d+)[].]", name) for name in names]
    if not all(found):
        raise ValueError("names of modules with the layer's number in them")
    return sorted({int(match[1]) for match in found if match}) or None


def layer_of_module(value: Any) -> int | None:
    """Return the one layer that a list of modules' names holds."""
    found = layers_of_modules(value)
    if found is not None and len(found) != 1:
        raise ValueError("the name of one module, such as [model.layers[27].mlp.down_proj.weight]")
    return found[0] if found else None


def modules(value: Any) -> dict[Place, list[int]] | None:
    """Return the layers in modules' names by the kind of projection that they end in."""
    found: dict[Place, list[int]] = {}
    for name in value if layers_of_modules(value) else ():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind not in _PROJECTIONS:
            raise ValueError(f"projections of an MLP: modules that end in {', '.join(_PROJECTIONS)}")
        found.setdefault(_PROJECTIONS[kind], []).extend(layers_of_modules([name]) or [])
    return found or None


def names_at_the_end(value: Any) -> list[str] | None:
    """Return the last parts of modules' names or patterns, each once."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of names of modules, such as [q_proj, v_proj]")
    return list(dict.fromkeys(re.split(r"[.*]", name.rstrip(".*"))[-1] for name in value)) or None


def folder(value: Any) -> str | None:
    """Return the folder of a checkpoint, or None for none."""
    if value is None:
        return None
    if Path(text(value)).is_file():
        raise ValueError(
            "a folder that everedit train or EditTrainer wrote: this file is other code's, a pickle, and is not read"
        )
    return str(value)
