"""What MEMIT and its relatives share: hidden states optimised behind the last of several layers, and a gap that is
closed layer by layer, each with the changes of the layers before it in place. They differ in the problem that each
layer solves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.downdate import Forgotten
from everedit.engine.keys import LayerWalk
from everedit.engine.solve import recursive_step, ridge_update
from everedit.engine.spread import SHARES, at_depth, check_layers
from everedit.engine.state import Growing, State
from everedit.engine.target import Target, TargetConfig, optimise_targets, value_settings
from everedit.methods._base import GPT_LIKE, SMOLLM2_135M, Method, MethodConfig
from everedit.models.layout import Layout
from everedit.patch import LowRank, Patch

__all__ = ["RidgeConfig", "RidgeMethod", "SpreadConfig", "SpreadMethod", "later_target", "taken_out"]

# Published ranges, by family and number of layers (memit.md, "Hyperparameters").
_LAYERS = {
    ("gpt2", 48): (13, 17),
    ("gptj", 28): (3, 8),
    ("gpt_neox", 44): (6, 10),
    ("llama", 32): (4, 8),
    ("llama", 28): (4, 8),
}
# Searched for models too small for any published setting, on records that no table uses (docs/results/settings.md);
# by family, number of layers and hidden size: layers, value optimisation.
_SEARCHED: dict[tuple[str, int, int], tuple[tuple[int, ...], dict[str, float]]] = {
    SMOLLM2_135M: ((14, 15, 16), {"lr": 1.0, "steps": 40})
}
_STARTS = ("The", "Therefore", "Because", "I", "You")


class SpreadConfig(MethodConfig):
    """Settings that these methods have in common; None means the published value for the family."""

    layers: tuple[int, ...] | None = Field(None, description="edited layers; published, else 1/8 to 1/4 of the depth")
    target: TargetConfig | None = Field(None, description="settings of the value optimisation")
    contexts: tuple[tuple[int, int], ...] = Field(((10, 5),), description="sampled prefixes: (total tokens, how many)")
    share: Literal["equal", "sqrt"] = Field("equal", description="how the residual is shared among the layers")

    def resolved(self, layout: Layout) -> SpreadConfig:
        """Return the config with layers, target settings and the method's own filled in from the published tables."""
        family, depth = layout.family.name, layout.n_layers
        first, last = _LAYERS.get((family, depth), (at_depth(1 / 8, depth), at_depth(1 / 4, depth)))
        if family == "gpt2" and (family, depth) not in _LAYERS:
            first, last = at_depth(0.27, depth), at_depth(0.35, depth)
        size = (family, depth, layout.hidden_size)
        layers, searched = _SEARCHED.get(size, (tuple(range(first, last + 1)), {}))
        # What was searched goes on top: what else makes the method what it is stays.
        target = {**self.published_target(family), **searched}
        chosen = {
            "layers": check_layers(layers if self.layers is None else self.layers, depth),
            "target": TargetConfig.merged(target, self.target),
        }
        return self.model_copy(update=chosen | self.own_choices(layout, searched=size in _SEARCHED))

    def published_target(self, family: str) -> dict[str, float]:
        """Return the settings of the value optimisation that differ from :class:`TargetConfig`'s defaults."""
        target = {"weight_decay": 0.5, "clamp": 0.75} if family in GPT_LIKE else {}
        return target | ({"steps": 20} if family in ("gpt2", "gpt_neox") else {})

    def own_choices(self, layout: Layout, *, searched: bool) -> dict[str, Any]:
        """Return the method's own settings that depend on the model.

        ``searched`` tells that the model is too small for any published setting and that its were searched for.
        """
        return {}


def later_target(family: str) -> dict[str, float]:
    """Return the value optimisation of AlphaEdit's released code, which its successors took over: a decay of 0.5 and a
    clamp of 0.75 everywhere.
    """
    target = {"weight_decay": 0.5, "clamp": 0.75}
    return target | ({"steps": 20} if family == "gpt2" else {"lr": 0.1} if family not in GPT_LIKE else {})


class RidgeConfig(SpreadConfig):
    """Settings of a method that weighs the second moments against the edit."""

    searched_weight: ClassVar[float] = 50.0
    """w for models too small for any published one (docs/results/settings.md)."""

    moment_weight: float | None = Field(None, ge=0, description="w, the weight of the second moments")

    def published_weight(self, family: str) -> float:
        """Return the published weight."""
        return 20_000.0 if family in ("gpt2", "gpt_neox") else 15_000.0

    def own_choices(self, layout: Layout, *, searched: bool) -> dict[str, Any]:
        """Return the published weight, or the one searched for."""
        weight = self.searched_weight if searched else self.published_weight(layout.family.name)
        return {"moment_weight": weight if self.moment_weight is None else self.moment_weight}


class SpreadMethod(Method):
    """Optimise, walk through the layers, solve each: a subclass says how."""

    config: SpreadConfig
    site = "block"

    def layers(self) -> tuple[int, ...]:
        """Return the edited layers in ascending order."""
        assert self.config.layers is not None
        return self.config.layers

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the sampled contexts."""
        return bench.contexts(self.config.contexts, _STARTS)

    def targets(self, bench: Workbench, edits: Sequence[Edit], prefixes: Sequence[str] | None = None) -> list[Target]:
        """Optimise the hidden state behind the last edited layer, for all edits together."""
        assert self.config.target is not None
        prefixes = self.prefixes(bench) if prefixes is None else prefixes
        with bench.clock.phase("target"):
            return optimise_targets(bench.lm, edits, prefixes, self.layers()[-1], self.config.target, site=self.site)

    def values_depend_on(self, bench: Workbench) -> dict[str, Any]:
        """Return what the value optimisation is given."""
        assert self.config.target is not None
        return value_settings(self.layers()[-1], self.site, self.prefixes(bench), self.config.target)

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return one change for each edited layer, solved for all edits together."""
        lm, layers = bench.lm, self.layers()
        targets = targets or self.targets(bench, edits)
        walk = LayerWalk(lm, edits, self.prefixes(bench), layers[-1])
        tensors = Growing(state.tensors)
        updates: dict[int, LowRank] = {}
        for index, layer in enumerate(layers):
            with bench.clock.phase("keys"):
                reading = walk.read(layer, updates)
            with bench.clock.phase("solve"):
                residual = self.residual(targets, reading.state, reading.output)
                residual = residual * SHARES[self.config.share](len(layers) - index)
                if self.site == "block":
                    residual = lm.layout.residual_step(layer, reading.mlp, residual)
                update = self.solve(bench, layer, _mean_key(reading.keys).T, residual.T, tensors)
                updates[layer] = LowRank(update.left.float(), update.right.float())
        deltas = {lm.layout.mlp_out_weight(layer): update for layer, update in updates.items()}
        return Patch(deltas), State(dict(tensors), state.values, tensors.grown)

    def residual(self, targets: Sequence[Target], state: Tensor, output: Tensor) -> Tensor:
        """Return what is missing at the last layer, (n, H): here, of its block's output ``state``."""
        return torch.stack([target.value for target in targets]) - state

    @abstractmethod
    def solve(self, bench: Workbench, layer: int, keys: Tensor, residual: Tensor, tensors: Growing) -> LowRank:
        """Return the change of ``layer`` that moves the outputs of ``keys`` (D, n) by ``residual`` (H, n).

        ``tensors`` are those of the method's state; what is put there is there at the next edit.
        """


class RidgeMethod(SpreadMethod):
    """Solves R K^T (w C + K K^T)^-1 in each layer."""

    config: RidgeConfig

    def solve(self, bench: Workbench, layer: int, keys: Tensor, residual: Tensor, tensors: Growing) -> LowRank:
        """Solve the regularised least-squares problem with the layer's second moments."""
        assert self.config.moment_weight is not None
        return ridge_update(bench.moments.get([layer])[layer].factor, self.config.moment_weight, keys, residual)


def taken_out(bench: Workbench, layers: Sequence[int], forgotten: Forgotten, state: State) -> tuple[Patch, State]:
    """Return what takes a step out of the recursive least-squares problem of each layer, and the state without it.

    The state holds each problem's inverse; the keys and values of all other steps stay as they were found.
    """
    tensors = Growing(state.tensors)
    gains: dict[str, tuple[str, Tensor, Tensor]] = {}
    for layer in layers:
        matrix = f"inverse|{layer}"
        keys = forgotten.keys[matrix].double()
        inverse = tensors[matrix].to(keys.device)
        gain, root = recursive_step(inverse, keys, sign=-1)
        gains[bench.lm.layout.mlp_out_weight(layer)] = matrix, inverse @ keys, gain
        tensors.grow(matrix, root)
    return Patch(forgotten.changes(gains)), State(dict(tensors), state.values, tensors.grown)


def _mean_key(keys: Tensor) -> Tensor:
    """Mean of the bare prompt's key and of the mean over the prefixes: (n, prefixes, D) -> (n, D)."""
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2 if keys.shape[1] > 1 else keys[:, 0]
