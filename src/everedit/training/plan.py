"""What a training will take, from one timed pass, before it is begun."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from everedit.models.memory import peak_memory_mb
from everedit.reporting import Reporter, Silent
from everedit.training.config import TrainConfig
from everedit.training.train import Trainer

__all__ = ["TrainPlan", "plan_training"]


@dataclass(frozen=True)
class TrainPlan:
    """A training's plan. ``parameters`` are those trained; memory is this process's after one pass and its gradients,
    with what the optimiser will keep; seconds are those of one timed pass times their number, validations among them.
    """

    method: str
    model: str
    examples: int
    held_out: int
    parameters: int
    steps: int
    seconds_a_step: float
    seconds_total: float
    memory_mb: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def plan_training(config: TrainConfig, reporter: Reporter | None = None) -> TrainPlan:
    """Return the plan of a training without beginning it; two passes are made, the second is timed."""
    config = config.resolved()
    trainer = Trainer.of(config, reporter or Silent())
    assert config.steps is not None
    assert config.check_every is not None
    trainer.learner.train()
    seconds = 0.0
    for step in (1, 2):
        start = time.perf_counter()
        loss, _ = trainer.learner(trainer.batch(step))
        loss.backward()
        seconds = time.perf_counter() - start
    parameters = sum(weight.numel() for weight in trainer.learner.parameters())
    # A validation pass has no outer backward, which is about two thirds of a pass.
    validations = config.steps / config.check_every * len(trainer.held_out) / (config.batch or 1) / 3
    return TrainPlan(
        config.method,
        config.model,
        len(trainer.examples),
        len(trainer.held_out),
        parameters,
        config.steps,
        round(seconds, 3),
        round(seconds * (config.steps + validations), 1),
        round(peak_memory_mb() + 2 * 4 * parameters / 2**20),
    )
