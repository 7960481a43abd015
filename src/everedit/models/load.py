"""Load a model by alias, local folder or Hugging Face id; device and dtype are decided here, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from everedit.errors import ModelError, near_names
from everedit.models.model import LanguageModel
from everedit.models.packaged import ALIASES, packaged_folder

__all__ = ["load_model", "pick_device", "pick_dtype", "quiet"]


def load_model(
    name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> LanguageModel:
    """Return the model called ``name``: an alias (``everedit models ls``), a local folder, or a hub id.

    ``device`` defaults to the accelerator at hand, else the CPU; ``dtype`` to the checkpoint's own on an
    accelerator and to float32 elsewhere.

    Raises :class:`ModelError` if it cannot be found or read, has no tokenizer, has weights that are not finite,
    or has parts that cannot be located.
    """
    place = pick_device(device)
    source = _source(str(name))
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source)
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = auto.from_pretrained(source, dtype=pick_dtype(dtype, place))
    except Exception as error:
        raise ModelError(
            what=f"cannot load the model: {_first_line(error)}", where=str(source), fix=_advice(str(name))
        ) from error
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ModelError(
            what=f"the model has no tokenizer that can be read: {_first_line(error)}",
            where=str(source),
            fix="put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder",
        ) from error
    # Without its files, transformers makes many a tokenizer that knows special tokens alone.
    if not tokenizer.decode(tokenizer("a").input_ids, skip_special_tokens=True).strip():
        raise ModelError(
            what="the model's tokenizer is empty",
            where=str(source),
            fix="put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder",
        )
    loaded = LanguageModel(str(name), model.to(place), tokenizer)
    loaded.check_logits()
    return loaded


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, else the accelerator at hand, else torch's default device."""
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ModelError(what=f"'{device}' is not a device", fix="leave --device out to use the best") from error
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.get_default_device()
    return torch.get_default_device()


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> Any:
    """Return the dtype asked for, else ``"auto"`` on an accelerator and float32 elsewhere."""
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ModelError(what=f"'{dtype}' is not a dtype for weights", fix="use float32, bfloat16 or float16")
        return found
    if dtype is not None:
        return dtype
    return torch.float32 if device.type == torch.get_default_device().type else "auto"


def _source(name: str) -> Path | str:
    if name in ALIASES:
        return packaged_folder(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(
                what="this folder holds no model (it has no config.json)",
                where=str(path),
                fix="give the folder that save_pretrained wrote",
            )
        return path
    if path.exists():
        raise ModelError(what="a model is a folder, and this is a file", where=str(path), fix="give its folder")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    if "/" in name:
        raise ModelError(what="there is no such folder", where=name, fix="check the path")
    raise near_names("model", name, list(ALIASES))


def _advice(name: str) -> str:
    if name in ALIASES:
        return f"the converted copy may be damaged: delete {ALIASES[name].folder} and try again"
    return "check the folder, or the id and the connection to the hub"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class quiet:
    """Silence transformers' progress bars and notices while it loads, and put its settings back."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._level)
        if self._bars:
            transformers_logging.enable_progress_bar()
