"""The networks that MEND and MALMEN train: transforms of each token's input and output gradient, by shape of weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.engine.hyper import GradientTransform
from everedit.engine.learner import Learner, Metrics
from everedit.engine.tail import Tail
from everedit.methods._trained import (
    Example,
    TrainedConfig,
    base_log_probabilities,
    changed_weights,
    edit_gradients,
    kl_to_base,
)
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import LowRank

__all__ = ["TransformConfig", "TransformLearner"]


class TransformConfig(TrainedConfig):
    """Settings that both have in common: MEND's, those of the paper."""

    rank: int = Field(1920, ge=1, description="r, of the networks' blocks")
    blocks: int = Field(2, ge=1, description="residual blocks of a network")
    shared: bool = Field(True, description="one network for all weights of a shape, or one for each weight")
    normalise: bool = Field(True, description="the networks read inputs and gradients over their running deviation")
    step: float = Field(1e-4, description="alpha_l at the start of training")
    lr: float = Field(1e-6, gt=0, description="Adam's learning rate of the networks in training")
    step_lr: float = Field(1e-4, gt=0, description="Adam's learning rate of alpha_l in training")
    c_edit: float = Field(0.1, ge=0, description="weight of the edit's loss in training")
    c_loc: float = Field(1.0, ge=0, description="weight of the KL divergence on other texts in training")


class TransformLearner(Learner):
    """The networks, by shape of weight or by weight, and the step sizes."""

    def __init__(self, lm: LanguageModel, names: Sequence[str], config: TransformConfig, seed: int) -> None:
        super().__init__(lm)
        self.names, self.config = list(names), config
        shapes = {name: tuple(oriented(lm.layout.module_of(name)).shape) for name in names}
        groups: dict[str, list[str]] = {}
        for number, name in enumerate(names):
            d_out, d_in = shapes[name]
            groups.setdefault(f"{d_in}x{d_out}" if config.shared else str(number), []).append(name)
        # By shape and place in the list, as in training: the order of names is part of a checkpoint.
        self.place = {name: (key, members.index(name)) for key, members in groups.items() for name in members}
        self.networks = nn.ModuleDict()
        for index, (key, members) in enumerate(groups.items()):
            d_out, d_in = shapes[members[0]]
            self.networks[key] = GradientTransform(
                d_in, d_out, len(members), rank=config.rank, blocks=config.blocks, seed=seed + index
            )
        self.steps = nn.Parameter(torch.full((len(names),), config.step))
        self.to(lm.device)

    def groups(self) -> list[dict[str, Any]]:
        """Return the networks and the step sizes, each with its rate."""
        networks = {"params": list(self.networks.parameters()), "lr": self.config.lr}
        return [networks, {"params": [self.steps], "lr": self.config.step_lr}]

    def transformed(self, gradients: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each weight's pseudo inputs and gradients, those of one network's weights in one go."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for key, network in self.networks.items():
            names = [name for name in self.names if self.place[name][0] == key]
            sizes = [len(gradients[name][0]) for name in names]
            u, delta = (torch.cat([gradients[name][part] for name in names]) for part in (0, 1))
            numbers = torch.tensor([self.place[name][1] for name in names], device=u.device)
            rows = numbers.repeat_interleave(torch.tensor(sizes, device=u.device))
            pseudo_u, pseudo_delta = network(u, delta, rows, normalise=self.config.normalise)
            found |= dict(zip(names, zip(pseudo_u.split(sizes), pseudo_delta.split(sizes), strict=True), strict=True))
        return found

    def changes(self, gradients: dict[str, tuple[Tensor, Tensor]]) -> dict[str, LowRank]:
        """Return each weight's change for the edits' inputs and gradients (N, ·) taken together."""
        pseudo = self.transformed(gradients)
        return {
            name: LowRank(-self.steps[number] * pseudo[name][1].T, pseudo[name][0].T)
            for number, name in enumerate(self.names)
        }

    def tails(self, examples: Sequence[Edit]) -> tuple[Tail, Tail, Tail]:
        """Return the examples' edits, the edits in other words, and the other texts: nothing below them changes."""
        assert self.config.layers is not None
        texts = [Example.of(self.lm, edit) for edit in examples]
        groups = [[getattr(text, kind) for text in texts] for kind in ("edit", "rephrased", "other")]
        edits, rephrased, others = Tail.several(self.lm, groups, self.config.layers[0], self.kept)
        return edits, rephrased, others

    def forward(self, examples: Sequence[Edit]) -> tuple[Tensor, Metrics]:
        """Return the outer loss on some edits made together."""
        config = self.config
        edits, rephrased, others = self.tails(examples)
        base = base_log_probabilities(others)
        changes = self.changes(edit_gradients(edits, self.names))
        with changed_weights(self.lm, changes):
            logits = rephrased.logits()
            likely = F.cross_entropy(logits, rephrased.labels)
            moved, same = kl_to_base(others, base)
            if not self.training:
                own = edits.logits().argmax(-1) == edits.labels
        loss = config.c_edit * likely + config.c_loc * moved
        figures = {
            "loss": float(loss.detach()),
            "nll": float(likely.detach()),
            "kl": float(moved.detach()),
            "generalization": float((logits.argmax(-1) == rephrased.labels).float().mean()),
            "locality": same,
        }
        return loss, figures if self.training else {**figures, "reliability": float(own.float().mean())}
