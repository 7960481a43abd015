"""FT-L: FT with theta clamped to the box |theta - theta_0| <= eps after every step.

Zhu et al., "Modifying Memories in Transformer Models", arXiv 2012.00363, in the one-layer form of Meng et al., NeurIPS
2022. The box is around the weights before each edit, as in the released code, so that a stream may drift without
bound; ``box_around="stream"`` keeps the whole stream inside one box.
"""

from __future__ import annotations

from typing import Any, ClassVar

from everedit.methods._base import SMOLLM2_135M, Searched, Traits
from everedit.methods._finetune import FinetuneConfig, FinetuneMethod
from everedit.models.layout import Layout

# Published radii, by family and number of layers (ft.md, "Hyperparameters"); in these models layer 0 is trained.
_BOXES = {("gpt2", 24): 2e-3, ("gpt2", 36): 1e-3, ("gpt2", 48): 5e-4, ("gptj", 28): 5e-5}
_BOX = 5e-4


class FtLConfig(FinetuneConfig):
    """Settings of FT-L; None means the published value for the family."""

    searched: ClassVar[Searched] = {SMOLLM2_135M: {"layers": (20,), "lr": 2e-3, "box": 5e-3}}

    def published_layers(self, layout: Layout) -> tuple[int, ...]:
        """Return layer 0 where it was published, else FT's."""
        published = (layout.family.name, layout.n_layers) in _BOXES
        return (0,) if published else super().published_layers(layout)

    def own_choices(self, layout: Layout) -> dict[str, Any]:
        """Return the published radius."""
        if self.box is not None:
            return {}
        return {"box": _BOXES.get((layout.family.name, layout.n_layers), _BOX)}


class FtL(FinetuneMethod):
    """Fine-tuning of one matrix inside a box."""

    name = "ft-l"
    traits = Traits(
        title="FT-L, fine-tuning of one layer inside a box",
        paper="arXiv 2012.00363",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        keeps_state=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = FtLConfig
    config: FtLConfig


METHOD = FtL
