"""WilKE: ROME's change at the layer l* = argmin_l ||Delta_l||_F / ||W_l||_F, where the fact's pattern fits best.

Hu et al., "WilKE: Wise-Layer Knowledge Editor for Lifelong Knowledge Editing", Findings of ACL 2024, arXiv
2402.10987. The value is optimised and the rank-one change computed in every layer of a range; the one whose relative
size is smallest is committed. The released code then optimises again at the chosen layer; here the change that was
scored is the one that is written, which is the same up to rounding and saves a part of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.spread import check_layers
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._rank_one import Key, RankOneConfig, RankOneMethod
from everedit.models.layout import Layout, oriented
from everedit.patch import LowRank, Patch

# Published ranges, by family and number of layers: the lower half of GPT-2 XL, the lowest quarter of GPT-J.
_SCANNED = {("gpt2", 48): 24, ("gptj", 28): 7}


class WilkeConfig(RankOneConfig):
    """Settings of WilKE; None means the published value for the family."""

    layers: tuple[int, ...] | None = Field(None, description="the layers tried; published, else the lower half")

    def own_choices(self, layout: Layout, layer: int) -> dict[str, Any]:
        """Return the layers to try."""
        depth = layout.n_layers
        scanned = _SCANNED.get((layout.family.name, depth), max(1, depth // 2))
        return {"layers": check_layers(tuple(range(scanned)) if self.layers is None else self.layers, depth)}


class Wilke(RankOneMethod):
    """ROME in the layer that needs the least change, found anew for each edit."""

    name = "wilke"
    traits = Traits(
        title="WilKE, ROME at the wisest layer for each edit",
        paper="arXiv 2402.10987",
        keeps_state=True,
        chooses_layer=True,
    )
    Config = WilkeConfig
    config: WilkeConfig

    def layers(self) -> tuple[int, ...]:
        """Return the layers tried."""
        assert self.config.layers is not None
        return self.config.layers

    def targets(self, bench: Workbench, edits: Sequence[Edit], prefixes: Sequence[str] | None = None) -> list[Target]:
        """Return none: a value belongs to a layer, and the layer is chosen with the values of all at hand."""
        return []

    def keys_used(self) -> tuple[Key, Key]:
        """Return ROME's keys."""
        return "mean", "bare"

    def going_back(self, patch: Patch) -> Wilke:
        """Return WilKE at the layer that was chosen for the edit, without another search."""
        return Wilke(self.config.model_copy(update={"layers": (int(patch.info["layer"]),)}))

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the change of the layer with the smallest score; scores and choice are in the patch's ``info``."""
        edit = self.only(edits)
        scores: dict[int, float] = {}
        best: tuple[int, LowRank] | None = None
        for layer in self.layers():
            update = self.update(bench, edit, layer, self.targets_at(layer, bench, edits)[0])
            scores[layer] = update.norm() / float(oriented(bench.lm.layout.mlp_out(layer)).float().norm())
            if best is None or scores[layer] < scores[best[0]]:
                best = layer, update
        assert best is not None
        chosen = best[0]
        counts = {**state.values.get("chosen", {})}
        counts[str(chosen)] = counts.get(str(chosen), 0) + 1
        info = {"layer": chosen, "scores": {str(layer): score for layer, score in scores.items()}}
        patch = Patch({bench.lm.layout.mlp_out_weight(chosen): best[1]}, info)
        return patch, State(state.tensors, {**state.values, "chosen": counts})


METHOD = Wilke
