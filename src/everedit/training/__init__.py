"""Training of the methods that learn to edit: one resumable loop, and checkpoints with a card."""

from everedit.training.config import TrainConfig
from everedit.training.plan import TrainPlan, plan_training
from everedit.training.train import resume, train

__all__ = ["TrainConfig", "TrainPlan", "plan_training", "resume", "train"]
