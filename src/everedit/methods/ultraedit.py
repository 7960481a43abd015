"""UltraEdit: W <- W + V^T (H H^T + ridge I)^-1 H with V = -eta ||h~||^2 g~, row by row.

Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models", TMLR 2026, arXiv
2505.14679. One backward pass gives, at the places that predict the answer, each module's inputs H and the gradients G
by its outputs. The pairs [h; g] are normalised with running statistics of the whole stream, one for each module shape,
which already hold this turn; the pseudo-values V are fitted on the raw inputs by ridge regression. The statistics are
merged exactly, where the released code makes the deviation slightly too large (ultraedit.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.gradients import joined, module_gradients
from everedit.engine.running import RunningMoments
from everedit.engine.solve import Factor
from everedit.engine.spread import at_depth, check_layers
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.methods._base import SMOLLM2_135M, Method, MethodConfig, Searched, Traits
from everedit.models.layout import Layout
from everedit.patch import LowRank, Patch

Place = Literal["mlp_out", "mlp_in", "mlp_gate", "mlp_up"]

# Published modules, by family and number of layers (ultraedit.md, "Settings"; the setting for ZsRE).
_MODULES: dict[tuple[str, int], dict[Place, tuple[int, ...]]] = {
    ("llama", 32): {"mlp_gate": tuple(range(11, 16)), "mlp_up": tuple(range(18, 25))},
    ("llama", 28): {"mlp_in": tuple(range(18, 27))},
    ("gptj", 28): {"mlp_out": tuple(range(18, 27))},
}


class UltraEditConfig(MethodConfig):
    """Settings of UltraEdit; None means the published value for the family."""

    modules: dict[Place, tuple[int, ...]] | None = Field(
        None, description="layers by kind of projection: mlp_out, mlp_in, or of a gated MLP mlp_gate and mlp_up"
    )
    searched: ClassVar[Searched] = {SMOLLM2_135M: {"eta": 1e-4, "modules": {"mlp_out": tuple(range(19, 28))}}}

    eta: float = Field(1e-6, ge=0, description="step size; it scales with a module's width and does not carry over")
    ridge: float = Field(1.0, gt=0, description="ridge, in units of an input's squared norm")
    chunk: int = Field(10, ge=1, description="edits in one backward pass; its loss is the mean over their tokens")
    positions: Literal["answers", "all"] = Field(
        "answers", description="places collected: those that predict the answer, or all (EasyEdit's port)"
    )

    def resolved(self, layout: Layout) -> UltraEditConfig:
        """Return the config with the published modules, else with the down projections of the upper third."""
        depth = layout.n_layers
        upper: dict[Place, tuple[int, ...]] = {
            "mlp_out": tuple(range(at_depth(0.65, depth), max(at_depth(0.65, depth) + 1, at_depth(0.95, depth))))
        }
        config = self.with_searched(layout)
        modules = config.modules or _MODULES.get((layout.family.name, depth), upper)
        checked = {place: check_layers(layers, depth) for place, layers in modules.items()}
        return config.model_copy(update={"modules": checked})


class UltraEdit(Method):
    """A closed form on gradients: no subject, no statistics beforehand, no training."""

    name = "ultraedit"
    traits = Traits(
        title="UltraEdit, normalised gradients in closed form",
        paper="arXiv 2505.14679",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        keeps_state=True,
        writes_mlp_values=False,
    )
    Config = UltraEditConfig
    config: UltraEditConfig

    def layers(self) -> tuple[int, ...]:
        """Return the layers that hold a changed weight."""
        assert self.config.modules is not None
        return tuple(sorted({layer for layers in self.config.modules.values() for layer in layers}))

    def work(self, tokens: float) -> float:
        """Return one forward and one backward pass."""
        return 2 * tokens

    def weights(self, layout: Layout) -> list[str]:
        """Return the names of the weights that change."""
        assert self.config.modules is not None
        return [name for place, layers in self.config.modules.items() for layer in layers
                for name in _names(layout, place, layer)]  # fmt: skip

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return one turn's change of every module, and the statistics with this turn in them."""
        modules = {name: bench.lm.layout.module_of(name) for name in self.weights(bench.lm.layout)}
        with bench.clock.phase("gradients"):
            found = self._gather(bench, edits, modules)
        with bench.clock.phase("solve"):
            statistics = _statistics(state)
            for inputs, gradients in found.values():
                fresh = RunningMoments.of(torch.cat([inputs, gradients], dim=1))
                key = f"{inputs.shape[1]}x{gradients.shape[1]}"
                statistics[key] = statistics[key].joined(fresh) if key in statistics else fresh
            deltas = {name: self._change(*pair, statistics) for name, pair in found.items()}
        return Patch(deltas), _saved(statistics)

    def _gather(
        self, bench: Workbench, edits: Sequence[Edit], modules: dict[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        texts = [bench.lm.encode(edit.prompt, edit.target_new) for edit in edits]
        parts = [
            module_gradients(
                bench.lm, texts[start : start + self.config.chunk], modules, positions=self.config.positions
            )
            for start in range(0, len(texts), self.config.chunk)
        ]
        return joined(parts)

    def _change(self, inputs: Tensor, gradients: Tensor, statistics: dict[str, RunningMoments]) -> LowRank:
        """Return the ridge regression of the pseudo-values on the inputs, in its N x N form."""
        moments = statistics[f"{inputs.shape[1]}x{gradients.shape[1]}"]
        pairs = moments.normalised(torch.cat([inputs, gradients], dim=1))
        h, g = pairs[:, : inputs.shape[1]], pairs[:, inputs.shape[1] :]
        values = -self.config.eta * h.pow(2).sum(1, keepdim=True) * g
        raw = inputs.double()
        gram = raw @ raw.T + self.config.ridge * torch.eye(len(raw), dtype=raw.dtype, device=raw.device)
        return LowRank(values.T.float().contiguous(), Factor.of(gram).solve(raw).T.float().contiguous())


def _names(layout: Layout, place: Place, layer: int) -> list[str]:
    if place == "mlp_out":
        return [layout.mlp_out_weight(layer)]
    names = layout.mlp_in_weights(layer)
    if place == "mlp_in":
        return names
    return [names[0] if place == "mlp_gate" else names[-1]]


def _statistics(state: State) -> dict[str, RunningMoments]:
    return {
        key: RunningMoments(count, state.tensors[f"mean|{key}"], state.tensors[f"squares|{key}"])
        for key, count in state.values.get("rows", {}).items()
    }


def _saved(statistics: dict[str, RunningMoments]) -> State:
    tensors = {f"mean|{key}": moments.mean for key, moments in statistics.items()}
    tensors |= {f"squares|{key}": moments.squares for key, moments in statistics.items()}
    return State(tensors, {"rows": {key: moments.count for key, moments in statistics.items()}})


METHOD = UltraEdit
