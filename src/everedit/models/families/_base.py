"""What a family's file states."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep their parts.

    Paths of ``blocks``, ``final_norm`` and ``encoder_blocks`` start at the model, the others at a block.
    ``mlp_in`` lists alternatives: the first whose modules all exist is taken (gated or plain MLPs of one family).
    ``mlp_norm`` is a norm between the MLP and the residual stream (Gemma 2 and 3); most families have none.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    mlp_in: tuple[tuple[str, ...], ...]
    mlp_out: str
    attention_out: str
    final_norm: str
    mlp_norm: str | None = None
    encoder_blocks: str | None = None
    encoder_mlp_in: tuple[tuple[str, ...], ...] = ()
    encoder_mlp_out: str | None = None
