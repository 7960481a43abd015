"""MALMEN: S_l = (U^T U + e^lambda_l I)^-1 U^T D, the ridge regression on the inputs of what MEND's network asks for.

Tan, Zhang and Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024, arXiv 2311.04661. For each
token j of all edits together the network's pseudo pair gives a wanted change of the output, d_j = -alpha_l (u_j . u~_j)
delta~_j; the weights' change is the least-squares fit of all of them, not their sum. lambda_l is learned. In training
the outer gradient is pushed through the closed form by hand: with G = dL/dS, dL/dD = U (U^T U + e^lambda I)^-1 G, so
that neither pass holds the other's graph and memory does not grow with the number of edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.gradients import joined
from everedit.engine.learner import Learner, Metrics
from everedit.engine.solve import Factor
from everedit.engine.spread import check_layers
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._trained import (
    TrainedMethod,
    base_log_probabilities,
    edit_gradients,
    kl_to_base,
)
from everedit.methods._transform import TransformConfig, TransformLearner
from everedit.models import LanguageModel
from everedit.models.hooks import changed_output
from everedit.models.layout import Layout
from everedit.patch import Delta, Dense, LowRank, Patch

Pairs = Mapping[str, tuple[Tensor, Tensor]]


class MalmenConfig(TransformConfig):
    """Settings of MALMEN, EasyEdit's for GPT-2 XL."""

    rows_a_pass: int = Field(16, ge=1, description="examples in one pass through the model")
    ridge: float = Field(0.0, description="lambda_l at the start of training; the ridge is its exponential")
    step_lr: float = Field(1e-5, gt=0, description="Adam's learning rate of alpha_l and lambda_l in training")
    c_edit: float = Field(1.0, ge=0, description="weight of the edit's loss in training")

    def resolved(self, layout: Layout) -> Self:
        """Return the config with the last six layers, where no others are asked for."""
        config, depth = self.with_searched(layout), layout.n_layers
        layers = config.layers or tuple(range(max(0, depth - 6), depth))
        return config.model_copy(update={"layers": check_layers(layers, depth)})


class RidgeFit:
    """Fits changes of outputs D (N, d_out) at inputs U (N, d_in) by S = U^T (U U^T + ridge I)^-1 D, from that system or
    from U^T U + ridge I, whichever is smaller.
    """

    def __init__(self, inputs: Tensor, ridge: float) -> None:
        self.inputs, self.ridge = inputs.double(), ridge
        tokens, width = inputs.shape
        self._by_tokens = tokens <= width
        gram = self.inputs @ self.inputs.T if self._by_tokens else self.inputs.T @ self.inputs
        self._factor = Factor.of(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))

    def change(self, wanted: Tensor) -> Delta:
        """Return the weight's change S^T, (d_out, d_in)."""
        if self._by_tokens:
            return LowRank(self._factor.solve(wanted).T.float().contiguous(), self.inputs.T.float().contiguous())
        # As factors they would be what no input explains, over the ridge, and U^T: too large to cancel in float32.
        return Dense(self._fitted(wanted).T.float().contiguous())

    def _fitted(self, wanted: Tensor) -> Tensor:
        return self._factor.solve(self.inputs.T @ wanted.double())

    def gradients(self, outer: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return dL/dD (N, d_out) and dL/dridge () for G = dL/dS^T (d_out, d_in)."""
        # With M = (U^T U + ridge I)^-1: S = M U^T D, dM = -M M dridge, and U M = (U U^T + ridge I)^-1 U.
        if self._by_tokens:
            of_wanted = self._factor.solve(self.inputs @ outer.double().T)
            return of_wanted, -(of_wanted * self._factor.solve(wanted)).sum()
        inner = self._factor.solve(outer.T)
        return self.inputs @ inner, -(inner * self._fitted(wanted)).sum()


class MalmenLearner(TransformLearner):
    """MEND's networks, and the logarithm of each weight's ridge."""

    config: MalmenConfig

    def __init__(self, lm: LanguageModel, names: Sequence[str], config: MalmenConfig, seed: int) -> None:
        super().__init__(lm, names, config, seed)
        self.ridges = nn.Parameter(torch.full((len(names),), config.ridge, device=lm.device))

    def groups(self) -> list[dict[str, Any]]:
        """Return the networks, and the step sizes and ridges, each with its rate."""
        networks, steps = super().groups()
        return [networks, {**steps, "params": [self.steps, self.ridges]}]

    def wanted(self, gradients: Pairs) -> dict[str, Tensor]:
        """Return d_j = -alpha (u_j . u~_j) delta~_j of every token, (N, d_out) for each weight."""
        found = {}
        for number, (name, (pseudo_u, pseudo_delta)) in enumerate(self.transformed(dict(gradients)).items()):
            assert name == self.names[number]
            inner = (gradients[name][0] * pseudo_u).sum(1, keepdim=True)
            found[name] = -self.steps[number] * inner * pseudo_delta
        return found

    def fits(self, gradients: Pairs) -> dict[str, RidgeFit]:
        """Return each weight's least-squares problem."""
        ridges = self.ridges.detach().exp().tolist()
        return {name: RidgeFit(gradients[name][0], ridge) for name, ridge in zip(self.names, ridges, strict=True)}

    def forward(self, examples: Sequence[Edit]) -> tuple[Tensor, Metrics]:
        """Return the outer loss on edits made together; its gradient comes from the closed form."""
        parts = [examples[at : at + self.config.rows_a_pass] for at in range(0, len(examples), self.config.rows_a_pass)]
        tails = [self.tails(part) for part in parts]
        gradients = joined([edit_gradients(edits, self.names, tokens=1) for edits, _, _ in tails])
        wanted, fits = self.wanted(gradients), self.fits(gradients)
        with torch.no_grad():
            changes = {name: fits[name].change(wanted[name].detach()).dense() for name in self.names}
        outer, figures = self._outer(tails, changes, len(examples))
        loss = torch.tensor(figures["loss"], device=self.steps.device)
        if self.training:
            stand_in = loss.new_zeros(())
            for number, name in enumerate(self.names):
                of_wanted, of_ridge = fits[name].gradients(outer[name], wanted[name].detach())
                stand_in = stand_in + (of_wanted.float() * wanted[name]).sum()
                stand_in = stand_in + of_ridge.float() * self.ridges[number].exp()
            # The value of the loss, with the gradient of what stands in for it.
            loss = loss + stand_in - stand_in.detach()
        return loss, figures

    def _outer(
        self, tails: Sequence[tuple[Tail, Tail, Tail]], changes: Mapping[str, Tensor], examples: int
    ) -> tuple[dict[str, Tensor], Metrics]:
        """Return dL/dS^T of each weight, and the figures, part by part."""
        leaves = {name: change.requires_grad_(self.training) for name, change in changes.items()}
        outer = {name: torch.zeros_like(change) for name, change in changes.items()}
        total = dict.fromkeys(("loss", "nll", "kl", "generalization", "locality", "reliability"), 0.0)
        for edits, rephrased, others in tails:
            base, share = base_log_probabilities(others), len(edits) / examples
            with torch.set_grad_enabled(self.training), _with_changes(self.lm, leaves):
                logits = rephrased.logits()
                likely = F.cross_entropy(logits, rephrased.labels)
                moved, same = kl_to_base(others, base)
                loss = self.config.c_edit * likely + self.config.c_loc * moved
                with torch.no_grad():
                    right = float((edits.logits().argmax(-1) == edits.labels).float().mean())
            if self.training:
                for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                    outer[name] += share * gradient
            general = float((logits.argmax(-1) == rephrased.labels).float().mean())
            values = (float(loss.detach()), float(likely.detach()), float(moved.detach()), general, same, right)
            for name, value in zip(total, values, strict=True):
                total[name] += share * value
        return outer, total


def _with_changes(lm: LanguageModel, changes: Mapping[str, Tensor]) -> ExitStack:
    stack = ExitStack()
    for name, change in changes.items():

        def added(inputs: Tensor, output: Tensor, change: Tensor = change) -> Tensor:
            return output + F.linear(inputs.float(), change).to(output.dtype)

        stack.enter_context(changed_output(lm.layout.module_of(name), added))
    return stack


class Malmen(TrainedMethod):
    """MEND's transforms, put together by least squares."""

    name = "malmen"
    traits = Traits(
        title="MALMEN, learned transforms put together by least squares",
        paper="arXiv 2311.04661",
        needs_subject=False,
        needs_moments=False,
        needs_training=True,
        solves_batches=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = MalmenConfig
    config: MalmenConfig
    training: ClassVar[dict[str, Any]] = {
        "steps": 10_000, "batch": 1024, "accumulation": 1, "clip": 1.0, "check_every": 50, "patience": 1_000,
    }  # fmt: skip

    def weights(self, layout: Layout) -> list[str]:
        """Return the names of the down projections of the edited layers."""
        return [layout.mlp_out_weight(layer) for layer in self.layers()]

    def learner(self, bench: Workbench) -> Learner:
        """Return untrained networks."""
        return MalmenLearner(bench.lm, self.weights(bench.lm.layout), self.config, bench.seed)

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the least-squares change for all edits."""
        learner = self.trained(bench)
        assert isinstance(learner, MalmenLearner)
        texts = [bench.lm.encode(edit.prompt, edit.target_new) for edit in edits]
        size = self.config.rows_a_pass
        with bench.clock.phase("gradients"):
            found = [
                edit_gradients(Tail.of(bench.lm, texts[at : at + size], self.layers()[0]), learner.names, tokens=1)
                for at in range(0, len(texts), size)
            ]
            gradients = joined(found)
        with bench.clock.phase("solve"), torch.no_grad():
            wanted = learner.wanted(gradients)
            deltas = {name: fit.change(wanted[name]) for name, fit in learner.fits(gradients).items()}
        return Patch(deltas), state


METHOD = Malmen
