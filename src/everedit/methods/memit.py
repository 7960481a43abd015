"""MEMIT: Delta_l = R_l K_l^T (w C_l + K_l K_l^T)^-1 for each layer l of a range, in ascending order.

Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, equations 14 and 20. For each fact a hidden
state z at the last layer L of the range is optimised; then every layer, with the changes of the layers
before it in place, takes an equal share R_l = (Z - h) / (layers left) of what is still missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.keys import LayerWalk
from everedit.engine.solve import ridge_update
from everedit.engine.spread import SHARES, at_depth, check_layers
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig, optimise_targets
from everedit.methods._base import Method, MethodConfig, Traits
from everedit.models.layout import Layout
from everedit.patch import LowRank, Patch

# Published ranges, by family and number of layers (memit.md, "Hyperparameters").
_LAYERS = {
    ("gpt2", 48): (13, 17),
    ("gptj", 28): (3, 8),
    ("gpt_neox", 44): (6, 10),
    ("llama", 32): (4, 8),
    ("llama", 28): (4, 8),
}
# Searched for models too small for any published setting, on records that no table uses (docs/results/settings.md);
# by family, number of layers and hidden size: layers, moment weight, value optimisation.
_SEARCHED: dict[tuple[str, int, int], tuple[tuple[int, ...], float, dict[str, float]]] = {
    ("llama", 30, 576): ((14, 15, 16), 50.0, {"lr": 1.0, "steps": 40})  # SmolLM2-135M
}
_GPT_LIKE = ("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt")
_STARTS = ("The", "Therefore", "Because", "I", "You")


class MemitConfig(MethodConfig):
    """Settings of MEMIT; None means the published value for the family."""

    layers: tuple[int, ...] | None = Field(None, description="edited layers; published, else 1/8 to 1/4 of the depth")
    moment_weight: float | None = Field(None, gt=0, description="w, the weight of the second moments")
    target: TargetConfig | None = Field(None, description="settings of the value optimisation")
    contexts: tuple[tuple[int, int], ...] = Field(((10, 5),), description="sampled prefixes: (total tokens, how many)")
    share: Literal["equal", "sqrt"] = Field("equal", description="how the residual is shared among the layers")

    def resolved(self, layout: Layout) -> MemitConfig:
        """Return the config with layers, weight and target settings filled in from the published tables."""
        family, depth = layout.family.name, layout.n_layers
        first, last = _LAYERS.get((family, depth), (at_depth(1 / 8, depth), at_depth(1 / 4, depth)))
        if family == "gpt2" and (family, depth) not in _LAYERS:
            first, last = at_depth(0.27, depth), at_depth(0.35, depth)
        weight = 20_000.0 if family in ("gpt2", "gpt_neox") else 15_000.0
        target = {"weight_decay": 0.5, "clamp": 0.75} if family in _GPT_LIKE else {}
        target |= {"steps": 20} if family in ("gpt2", "gpt_neox") else {}
        published = tuple(range(first, last + 1)), weight, target
        layers, weight, target = _SEARCHED.get((family, depth, layout.hidden_size), published)
        return self.model_copy(
            update={
                "layers": check_layers(layers if self.layers is None else self.layers, depth),
                "moment_weight": self.moment_weight or weight,
                "target": TargetConfig.merged(target, self.target),
            }
        )


class Memit(Method):
    """Many facts at once, spread over several layers."""

    name = "memit"
    traits = Traits(title="MEMIT, mass editing over several layers", paper="arXiv 2210.07229", solves_batches=True)
    Config = MemitConfig
    config: MemitConfig

    def layers(self) -> tuple[int, ...]:
        """Return the edited layers in ascending order."""
        assert self.config.layers is not None
        return self.config.layers

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the sampled contexts."""
        return bench.contexts(self.config.contexts, _STARTS)

    def targets(self, bench: Workbench, edits: Sequence[Edit]) -> list[Target]:
        """Optimise the hidden state behind the last edited layer, for all edits together."""
        assert self.config.target is not None
        prefixes = self.prefixes(bench)
        with bench.clock.phase("target"):
            return optimise_targets(bench.lm, edits, prefixes, self.layers()[-1], self.config.target, site="block")

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return one change for each edited layer, solved for all edits together."""
        assert self.config.moment_weight is not None
        lm, layers = bench.lm, self.layers()
        wanted = torch.stack([target.value for target in targets or self.targets(bench, edits)])
        walk = LayerWalk(lm, edits, self.prefixes(bench), layers[-1])
        moments = bench.moments.get(layers)
        updates: dict[int, LowRank] = {}
        for index, layer in enumerate(layers):
            with bench.clock.phase("keys"):
                reading = walk.read(layer, updates)
            with bench.clock.phase("solve"):
                residual = (wanted - reading.state) * SHARES[self.config.share](len(layers) - index)
                residual = lm.layout.residual_step(layer, reading.mlp, residual)
                update = ridge_update(
                    moments[layer].factor, self.config.moment_weight, _mean_key(reading.keys).T, residual.T
                )
                updates[layer] = LowRank(update.left.float(), update.right.float())
        return Patch({lm.layout.mlp_out_weight(layer): update for layer, update in updates.items()}), state


def _mean_key(keys: Tensor) -> Tensor:
    """Mean of the bare prompt's key and of the mean over the prefixes: (n, prefixes, D) -> (n, D)."""
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2 if keys.shape[1] > 1 else keys[:, 0]


METHOD = Memit
