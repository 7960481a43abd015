"""A model turned into GGUF whole, for the architectures that differ from LLaMA in little: names, order, metadata."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from everedit.errors import NotApplicable
from everedit.export.gguf_tensors import Names, Planned, Weights
from everedit.export.gguf_tokenizer import describe_tokenizer
from everedit.models import LanguageModel

__all__ = ["Converted"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF's name of the architecture by ``model_type``."""
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_ELSEWHERE = (
    "export as merged and convert that folder with llama.cpp's convert_hf_to_gguf.py, or give start=FILE, a GGUF file "
    "of the unedited model"
)


class Converted:
    """The model ``lm`` as GGUF. Raises :class:`NotApplicable` for what llama.cpp would compute in another way."""

    def __init__(self, gguf: Any, lm: LanguageModel, type: str) -> None:
        config = lm.model.config
        if config.model_type not in ARCHITECTURES:
            raise NotApplicable(
                what=f"models of type '{config.model_type}' are not converted to GGUF here", fix=_ELSEWHERE
            )
        if config.hidden_act != "silu":
            raise _unlike(f"its activation is {config.hidden_act}")
        rope = _rope(config)
        if rope["rope_type"] not in ("default", "llama3"):
            raise _unlike(f"its positions are scaled by '{rope['rope_type']}'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _unlike("a part of each head has no positions")
        self._gguf, self._lm, self._type = gguf, lm, type
        self.names = Names(gguf, ARCHITECTURES[config.model_type], lm)

    def describe(self, writer: Any) -> None:
        """Write what llama.cpp must know to compute the model and to read its texts."""
        config = self._lm.model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_name(self._lm.name.rstrip("/").rpartition("/")[2])
        writer.add_context_length(_context(config, self._lm.context_tokens))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(_rope(config)["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(self._gguf.LlamaFileType[_FILE_TYPES.get(self._type, f"MOSTLY_{self._type.upper()}")])
        describe_tokenizer(writer, self._lm.tokenizer, config.vocab_size, _ELSEWHERE)

    def plan(self, weights: Weights) -> Iterator[Planned]:
        """Yield every tensor of the file."""
        if _rope(self._lm.model.config)["rope_type"] == "llama3":
            yield self._rope_factors()
        for name, _ in self._lm.model.named_parameters():
            tensor = self.names.tensor(name)
            if tensor is None:
                raise NotApplicable(what=f"GGUF knows no tensor for the weight '{name}'", fix=_ELSEWHERE)
            yield weights.planned(tensor, name)

    def _rope_factors(self) -> Planned:
        """Return by how much Llama 3 slows each frequency of its positions down."""
        rotary, config = self._lm.model.base_model.rotary_emb, self._lm.model.config
        scaled = rotary.inv_freq.detach().cpu().double().numpy()
        plain = float(_rope(config)["rope_theta"]) ** (-np.arange(len(scaled)) / len(scaled))
        factors = (plain / scaled).astype(np.float32)
        return Planned(
            "rope_freqs.weight", self._gguf.GGMLQuantizationType.F32, factors.shape, factors.dtype, lambda: factors
        )


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _context(config: Any, tokens: int) -> int:
    """Return the longest text that llama.cpp reads as the model does: it attends to all of it, in every layer."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or config.model_type == "mistral"
    return min(tokens, int(window)) if window and slides else tokens


def _unlike(what: str) -> NotApplicable:
    return NotApplicable(what=f"llama.cpp would compute another model: {what}", fix=_ELSEWHERE)
