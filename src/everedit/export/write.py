"""One way into every export: checked, written aside, and put in place when it is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from everedit._version import __version__
from everedit.cache import atomic_folder
from everedit.engine.settings import validated
from everedit.errors import EvereditError, ExportError, near_names
from everedit.export.card import card
from everedit.export.source import Source

__all__ = ["FORMATS", "Exported", "export"]

FORMATS = {"merged": "merged", "peft": "peft_adapter", "gguf": "gguf_file", "card": "card"}
"""The module of each format; it has ``Options``, ``WHAT`` it writes, and ``write``."""


@dataclass(frozen=True)
class Exported:
    """What was written: the format, the folder, the names of its files, and figures such as ranks and errors."""

    format: str
    path: Path
    files: tuple[str, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)


def export(source: Source, format: str, out: str | Path, **options: Any) -> Exported:
    """Write ``source`` to the new folder ``out`` as ``merged``, ``peft``, ``gguf`` or ``card``.

    The folder appears when it is whole; it also holds the card (README.md) and ``everedit.json``, which says from what
    it was made. ``options`` are those of the format's ``Options``.

    Raises, and leaves nothing behind: :class:`UnknownName` for a format that is none; :class:`EditError` for a bad
    option or if there is no edit; :class:`ExportError` if ``out`` is taken or cannot be written;
    :class:`NotApplicable` if the format cannot hold the edits.
    """
    if format not in FORMATS:
        raise near_names("format", format, list(FORMATS))
    exporter = import_module(f"everedit.export.{FORMATS[format]}")
    chosen = validated(exporter.Options, options, f"export as {format}")
    path = Path(out).expanduser().absolute()
    _require_free(path)
    if format != "card":
        source.require_weights(exporter.WHAT)
    try:
        with source.unedited() as lm:
            # Before anything is written: it looks at every weight that was changed.
            origin = source.provenance(lm)
            with atomic_folder(path) as folder:
                figures = exporter.write(source, lm, folder, chosen)
                about = {"everedit": __version__, "format": format, "figures": figures, **origin}
                text = json.dumps(_finite(about), indent=2, allow_nan=False)
                (folder / "everedit.json").write_text(text + "\n", encoding="utf-8")
                (folder / "README.md").write_text(card(source, about), encoding="utf-8")
                files = tuple(sorted(part.name for part in folder.iterdir()))
    except EvereditError:
        raise
    except (OSError, SafetensorError) as error:
        raise ExportError(
            what=f"the export cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            fix="choose a folder you may write to and that has space",
        ) from error
    return Exported(format, path, files, figures)


def _finite(value: Any) -> Any:
    """Return a JSON-like value whose numbers JSON has: a broken model's perplexity is infinite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _require_free(path: Path) -> None:
    try:
        taken = path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))
    except OSError as error:
        raise ExportError(what=f"cannot look into the folder: {error.strerror}", where=str(path)) from error
    if taken:
        raise ExportError(
            what="something stands there already, and exports overwrite nothing",
            where=str(path),
            fix="choose another --out, or move it away",
        )
