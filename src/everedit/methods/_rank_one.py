"""What ROME and its relatives share: one matrix, one key, one value, a change of rank one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.keys import subject_keys
from everedit.engine.solve import rank_one_update
from everedit.engine.spread import at_depth, check_layers
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig, optimise_targets, value_settings
from everedit.errors import EditError
from everedit.methods._base import GPT_LIKE, SMOLLM2_135M, Method, MethodConfig
from everedit.models.layout import Layout, oriented
from everedit.patch import LowRank, Patch

__all__ = ["RankOneConfig", "RankOneMethod"]

_SITE = "mlp"

Contexts = tuple[tuple[int, int], ...]
Key = Literal["bare", "mean"]

# Published layers, by family and number of layers (rome.md, "Hyperparameters").
_LAYERS = {
    ("gpt2", 24): 8,
    ("gpt2", 36): 12,
    ("gpt2", 48): 17,
    ("gptj", 28): 5,
    ("gpt_neox", 44): 15,
    ("llama", 32): 5,
    ("llama", 28): 5,
}
# Searched for models too small for any published setting, on records that no table uses (docs/results/settings.md);
# by family, number of layers and hidden size: layer, contexts, value optimisation.
_SEARCHED: dict[tuple[str, int, int], tuple[int, Contexts, dict[str, float]]] = {
    SMOLLM2_135M: (14, ((10, 5),), {"lr": 1.0, "steps": 40})
}


class RankOneConfig(MethodConfig):
    """Settings that these methods have in common; None means the published value for the family."""

    target: TargetConfig | None = Field(None, description="settings of the value optimisation")
    contexts: Contexts | None = Field(
        None, description="sampled prefixes, pairs of (total tokens, how many); published: ten of 5 and ten of 10"
    )
    second_moments: bool = Field(
        True, description="False: C is the identity and no statistics are needed, as in EasyEdit's files for ROME"
    )

    def resolved(self, layout: Layout) -> RankOneConfig:
        """Return the config with layer and target settings filled in from the published tables."""
        family, depth = layout.family.name, layout.n_layers
        layer = _LAYERS.get((family, depth), at_depth(0.35 if family == "gpt2" else 1 / 6, depth))
        target: dict[str, float] = {"steps": 20, "weight_decay": 0.5} if family in GPT_LIKE else {}
        target |= {"clamp": 3} if (family, depth) == ("gpt2", 24) else {}
        published: tuple[int, Contexts, dict[str, float]] = layer, ((5, 10), (10, 10)), target
        layer, contexts, target = _SEARCHED.get((family, depth, layout.hidden_size), published)
        chosen = {
            "contexts": contexts if self.contexts is None else self.contexts,
            "target": TargetConfig.merged(target, self.target),
        }
        return self.model_copy(update=chosen | self.own_choices(layout, layer))

    def own_choices(self, layout: Layout, layer: int) -> dict[str, Any]:
        """Return the method's own settings that depend on the model, whose published layer is ``layer``."""
        return {}


class OneLayerConfig(RankOneConfig):
    """Settings of a method that always writes to the same layer."""

    layer: int | None = Field(None, ge=0, description="the edited layer; published, else a sixth of the depth")

    def own_choices(self, layout: Layout, layer: int) -> dict[str, Any]:
        """Return the layer."""
        return {"layer": check_layers((layer if self.layer is None else self.layer,), layout.n_layers)[0]}


class RankOneMethod(Method):
    """One fact, one matrix, rank one."""

    config: RankOneConfig

    def layers(self) -> tuple[int, ...]:
        """Return the one edited layer."""
        assert isinstance(self.config, OneLayerConfig)
        assert self.config.layer is not None
        return (self.config.layer,)

    def moment_layers(self) -> tuple[int, ...]:
        """Return the edited layers, unless C is the identity."""
        return super().moment_layers() if self.config.second_moments else ()

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the sampled contexts."""
        assert self.config.contexts is not None
        return bench.contexts(self.config.contexts, ())

    def targets(self, bench: Workbench, edits: Sequence[Edit], prefixes: Sequence[str] | None = None) -> list[Target]:
        """Optimise the MLP's output at the subject's last token, for all edits together."""
        return self.targets_at(self.layers()[0], bench, edits, prefixes)

    def targets_at(
        self, layer: int, bench: Workbench, edits: Sequence[Edit], prefixes: Sequence[str] | None = None
    ) -> list[Target]:
        """As :meth:`targets`, in any layer."""
        assert self.config.target is not None
        prefixes = self.prefixes(bench) if prefixes is None else prefixes
        with bench.clock.phase("target"):
            return optimise_targets(bench.lm, edits, prefixes, layer, self.config.target, site=_SITE)

    def values_depend_on(self, bench: Workbench) -> dict[str, Any]:
        """Return what the value optimisation is given."""
        assert self.config.target is not None
        return value_settings(self.layers()[0], _SITE, self.prefixes(bench), self.config.target)

    def keys_used(self) -> tuple[Key, Key]:
        """Return which key gives the update's direction and which one is mapped to the value."""
        return "mean", "mean"

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the rank-one change for the one edit given."""
        edit = self.only(edits)
        layer = self.layers()[0]
        target = (targets or self.targets(bench, edits))[0]
        return Patch({bench.lm.layout.mlp_out_weight(layer): self.update(bench, edit, layer, target)}), state

    def only(self, edits: Sequence[Edit]) -> Edit:
        """Return the one edit. Raises :class:`EditError` if there are more."""
        if len(edits) != 1:
            raise EditError(what=f"{self.name} makes one edit at a time", fix="give edits one by one, or use memit")
        return edits[0]

    def update(self, bench: Workbench, edit: Edit, layer: int, target: Target) -> LowRank:
        """Return the change of ``layer`` that makes its key give the target."""
        with bench.clock.phase("keys"):
            keys = subject_keys(bench.lm, [edit], self.prefixes(bench), layer)[0]
        mean, bare = keys.mean(0), keys[0]
        factor = bench.moments.get([layer])[layer].factor if self.config.second_moments else None
        direction, write = ({"bare": bare, "mean": mean}[name] for name in self.keys_used())
        with bench.clock.phase("solve"):
            # v* - W k of the bare prompt is delta itself: the origin is the MLP's output there. The bias cancels.
            drift = oriented(bench.lm.layout.mlp_out(layer)).float() @ (write - bare)
            update = rank_one_update(factor, direction, write, target.delta - drift)
        return LowRank(update.left.float(), update.right.float())
