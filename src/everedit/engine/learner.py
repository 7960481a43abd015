"""What is trained before it can edit: networks beside a frozen model, with a loss over examples of edits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from everedit.edit import Edit
from everedit.engine.tail import KeptStates
from everedit.models import LanguageModel

__all__ = ["Learner"]

Metrics = dict[str, float]


class Learner(nn.Module, ABC):
    """Networks that a method needs. Its parameters and buffers are all that a checkpoint holds; ``lm`` stays frozen,
    and what examples give below the edited layers is ``kept`` from epoch to epoch.
    """

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.lm = lm
        self.kept = KeptStates()

    @abstractmethod
    def forward(self, examples: Sequence[Edit]) -> tuple[Tensor, Metrics]:
        """Return the loss to be minimised on some examples, and figures that say more of it.

        Among the figures of an evaluation pass is ``loss``: early stopping goes by it.
        """

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups, each with its learning rate."""

    def optimiser(self) -> Any:
        """Return the optimiser of the paper; Adam unless a method says otherwise."""
        import torch

        return torch.optim.Adam(self.groups(), foreach=False)

    def rate(self, step: int) -> float:
        """Return what the groups' learning rates are multiplied by in a pass, counted from 1."""
        return 1.0

    def after_step(self) -> None:
        """Put back into its bounds what has any; called after each step of the optimiser."""

    def after_validation(self, metrics: Metrics) -> None:
        """Let a schedule see the validation's mean figures."""
