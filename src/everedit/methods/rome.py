"""ROME: W <- W + (v* - W k*) (C^-1 k*)^T / ((C^-1 k*)^T k*), the least change of one matrix that maps k* to v*.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, equation 2. The key k* is the
input of the MLP's down projection in layer L at the subject's last token, averaged over sampled contexts; the
value v* is found by gradient descent on the MLP's output there. As in the released code, the direction
C^-1 k uses the averaged key and the rest the key of the bare prompt (``write_key="bare"``); the paper's own
form, also known as r-ROME, is ``write_key="mean"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.keys import subject_keys
from everedit.engine.solve import rank_one_update
from everedit.engine.spread import at_depth, check_layers
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig, optimise_targets
from everedit.errors import EditError
from everedit.methods._base import Method, MethodConfig, Traits
from everedit.models.layout import Layout, oriented
from everedit.patch import LowRank, Patch

Contexts = tuple[tuple[int, int], ...]

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
    ("llama", 30, 576): (14, ((10, 5),), {"lr": 1.0, "steps": 40})  # SmolLM2-135M
}
_GPT_LIKE = ("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt")


class RomeConfig(MethodConfig):
    """Settings of ROME; None means the published value for the family."""

    layer: int | None = Field(None, ge=0, description="the edited layer; published, else a sixth of the depth")
    target: TargetConfig | None = Field(None, description="settings of the value optimisation")
    contexts: Contexts | None = Field(
        None, description="sampled prefixes, pairs of (total tokens, how many); published: ten of 5 and ten of 10"
    )
    write_key: Literal["bare", "mean"] = Field("bare", description="the key that is mapped to the value")

    def resolved(self, layout: Layout) -> RomeConfig:
        """Return the config with layer and target settings filled in from the published tables."""
        family = layout.family.name
        fraction = 0.35 if family == "gpt2" else 1 / 6
        layer = _LAYERS.get((family, layout.n_layers), at_depth(fraction, layout.n_layers))
        target: dict[str, float] = {"steps": 20, "weight_decay": 0.5} if family in _GPT_LIKE else {}
        target |= {"clamp": 3} if (family, layout.n_layers) == ("gpt2", 24) else {}
        published: tuple[int, Contexts, dict[str, float]] = layer, ((5, 10), (10, 10)), target
        layer, contexts, target = _SEARCHED.get((family, layout.n_layers, layout.hidden_size), published)
        return self.model_copy(
            update={
                "layer": check_layers((layer if self.layer is None else self.layer,), layout.n_layers)[0],
                "contexts": contexts if self.contexts is None else self.contexts,
                "target": TargetConfig.merged(target, self.target),
            }
        )


class Rome(Method):
    """One fact, one matrix, rank one."""

    name = "rome"
    traits = Traits(title="ROME, rank-one model editing", paper="arXiv 2202.05262")
    Config = RomeConfig
    config: RomeConfig

    def layers(self) -> tuple[int, ...]:
        """Return the one edited layer."""
        assert self.config.layer is not None
        return (self.config.layer,)

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the sampled contexts."""
        assert self.config.contexts is not None
        return bench.contexts(self.config.contexts, ())

    def targets(self, bench: Workbench, edits: Sequence[Edit]) -> list[Target]:
        """Optimise the MLP's output at the subject's last token, for all edits together."""
        assert self.config.target is not None
        prefixes = self.prefixes(bench)
        with bench.clock.phase("target"):
            return optimise_targets(bench.lm, edits, prefixes, self.layers()[0], self.config.target, site="mlp")

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the rank-one change for the one edit given."""
        if len(edits) != 1:
            raise EditError(what=f"{self.name} makes one edit at a time", fix="give edits one by one, or use memit")
        layer = self.layers()[0]
        prefixes = self.prefixes(bench)
        target = (targets or self.targets(bench, edits))[0]
        with bench.clock.phase("keys"):
            keys = subject_keys(bench.lm, edits, prefixes, layer)[0]
        mean, bare = keys.mean(0), keys[0]
        factor = bench.moments.get([layer])[layer].factor
        with bench.clock.phase("solve"):
            # v* - W k of the bare prompt is delta itself: the origin is the MLP's output there. The bias cancels.
            write = bare if self.config.write_key == "bare" else mean
            drift = oriented(bench.lm.layout.mlp_out(layer)).float() @ (write - bare)
            update = rank_one_update(factor, mean, write, target.delta - drift)
        update = LowRank(update.left.float(), update.right.float())
        return Patch({bench.lm.layout.mlp_out_weight(layer): update}), state


METHOD = Rome
