"""What the fine-tuning methods share: gradient descent on the down projections of a few layers, the rest frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.spread import at_depth, check_layers
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.engine.tune import Objective, TuneConfig, tune
from everedit.methods._base import Method, MethodConfig
from everedit.models.layout import Layout
from everedit.patch import Dense, Patch

__all__ = ["FinetuneConfig", "FinetuneMethod"]

# Published layers, by family and number of layers (ft.md, "Hyperparameters").
_LAYERS = {("gpt2", 48): 1, ("gptj", 28): 21, ("llama", 32): 21, ("llama", 28): 21}


class FinetuneConfig(MethodConfig):
    """Settings that these methods have in common; None means the published value for the family."""

    layers: tuple[int, ...] | None = Field(None, description="trained layers; published, else 2/3 of the depth")
    steps: int = Field(25, ge=1, description="most passes over the batch")
    lr: float = Field(5e-4, gt=0, description="Adam's learning rate")
    stop_loss: float = Field(1e-2, ge=0, description="training stops when the batch's mean loss is below this")
    weight_decay: float = Field(0.0, ge=0, description="Adam's weight decay, toward 0 as in the released code")
    rows_a_step: int = Field(64, ge=1, description="edits in one gradient step")
    objective: Objective = Field(
        "prompt_last",
        description="prompt_last: all target tokens at the prompt's last one; target_new: each at its own",
    )
    box: float | None = Field(None, ge=0, description="radius of the box around each weight; None: no box")
    box_around: Literal["edit", "stream"] = Field(
        "edit", description="what the box is centred on: the weights before this edit, or before the whole stream"
    )

    def resolved(self, layout: Layout) -> FinetuneConfig:
        """Return the config with the layers and the method's own settings filled in."""
        depth, config = layout.n_layers, self.with_searched(layout)
        layers = config.published_layers(layout) if config.layers is None else config.layers
        return config.model_copy(update={"layers": check_layers(layers, depth), **config.own_choices(layout)})

    def published_layers(self, layout: Layout) -> tuple[int, ...]:
        """Return the layers trained where nothing else is asked for."""
        depth = layout.n_layers
        return (_LAYERS.get((layout.family.name, depth), at_depth(2 / 3, depth)),)

    def own_choices(self, layout: Layout) -> dict[str, Any]:
        """Return the method's own settings that depend on the model."""
        return {}


class FinetuneMethod(Method):
    """Trains until the answer is right."""

    config: FinetuneConfig

    def layers(self) -> tuple[int, ...]:
        """Return the trained layers."""
        assert self.config.layers is not None
        return self.config.layers

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass for each step; what is saved below the trained layer is not counted."""
        return 2 * self.config.steps * tokens

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return what training changed; for a box around the stream the state keeps the weights at its start."""
        config, layout = self.config, bench.lm.layout
        tensors = dict(state.tensors)
        starts = {layer: bench.weight(layout.mlp_out_weight(layer)) for layer in self.layers()}
        centres = None
        if config.box is not None and config.box_around == "stream":
            for layer, start in starts.items():
                tensors.setdefault(f"start|{layer}", start.clone().contiguous())
            centres = {layer: tensors[f"start|{layer}"] for layer in self.layers()}
        settings = TuneConfig(
            steps=config.steps,
            lr=config.lr,
            stop_loss=config.stop_loss,
            weight_decay=config.weight_decay,
            rows_a_step=config.rows_a_step,
            objective=config.objective,
            box=config.box,
        )
        with bench.clock.phase("train"):
            changes = tune(bench.lm, edits, starts, settings, centres)
        deltas = {layout.mlp_out_weight(layer): Dense(change) for layer, change in changes.items()}
        return Patch(deltas), State(tensors, state.values)
