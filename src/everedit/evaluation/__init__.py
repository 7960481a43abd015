"""Evaluation: pure metrics, batched scoring, named protocols. It knows models and edits, never methods."""

from everedit.evaluation.evaluate import Baseline, EditScores, Evaluator
from everedit.evaluation.protocols import PROTOCOLS

__all__ = ["PROTOCOLS", "Baseline", "EditScores", "Evaluator"]
