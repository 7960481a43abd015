"""The edited model as a GGUF file, for llama.cpp and what is built on it.

Where a GGUF file of the unedited model is at hand (``start``, or the one that a packaged model came in), everything in
it stays as it is, quantised tensors too, but for the tensors that were edited. Without one, models of some
architectures are converted whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from everedit._version import __version__
from everedit.export.gguf_begun import Begun
from everedit.export.gguf_convert import Converted
from everedit.export.gguf_tensors import Planned, Weights, load_gguf
from everedit.export.merged import copy_licence
from everedit.export.source import Source
from everedit.models import LanguageModel
from everedit.models.packaged import ALIASES

__all__ = ["Options", "write"]

WHAT = "a GGUF file"
NAME = "model.gguf"


class Options(BaseModel):
    """Settings of this export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = Field(
        "f16", description="type of the matrices that are written: the edited ones, or all if the model is converted"
    )
    start: Path | None = Field(
        None, description="a GGUF file of the unedited model to begin from; the packaged one, where there is one"
    )
    whole: bool = Field(False, description="convert the whole model, whatever file there is to begin from")


def write(source: Source, lm: LanguageModel, folder: Path, options: Options) -> dict[str, Any]:
    """Write ``model.gguf`` into ``folder``.

    The figures hold for every edited tensor its type, and how much of its change is lost by rounding to that, relative
    to the change. Raises :class:`NotApplicable` if there is no file to begin from and the model cannot be converted,
    and :class:`ModelError` if the file is not one of the unedited model.
    """
    gguf = load_gguf()
    with _start(lm, options, folder) as start:
        draft = Converted(gguf, lm, options.type) if start is None else Begun(gguf, lm, start)
        weights = Weights(gguf, source, lm, draft.names, options.type)
        writer = gguf.GGUFWriter(folder / NAME, draft.names.architecture)
        draft.describe(writer)
        writer.add_string("everedit.version", __version__)
        writer.add_string("everedit.base_fingerprint", lm.fingerprint)
        _save(writer, list(draft.plan(weights)))
    copy_licence(lm, folder)
    begun = "the model's weights" if start is None else "a GGUF file of the base"
    return {"from": begun, "lost": max(row["lost"] for row in weights.figures.values()), "tensors": weights.figures}


@contextmanager
def _start(lm: LanguageModel, options: Options, folder: Path) -> Iterator[Path | None]:
    """Give the file to begin from while the block runs: the one given, or the one that the model was packaged in."""
    entry = None if options.whole else ALIASES.get(lm.name)
    if options.start is not None or entry is None or not entry.is_installed:
        yield None if options.whole else options.start
        return
    # A file that is put together from parts is as large as the model: it is kept where the export is written.
    with TemporaryDirectory(dir=folder) as scratch:
        yield entry.gguf(Path(scratch))


def _save(writer: Any, plan: Iterable[Planned]) -> None:
    """Write the file tensor by tensor: no more than one of them is in memory."""
    tensors = list(plan)
    try:
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.bytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.make())
    finally:
        writer.close()
