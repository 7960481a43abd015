"""Evaluation: pure metrics, batched scoring, named protocols. It knows models and edits, never methods."""

from everedit.evaluation.evaluate import Baseline, EditScores, Evaluator
from everedit.evaluation.judge import EndpointJudge, Judge, JudgeConfig
from everedit.evaluation.protocols import FOR_ANY_DATA, GENERAL, PROTOCOLS
from everedit.evaluation.references import References

__all__ = [
    "FOR_ANY_DATA",
    "GENERAL",
    "PROTOCOLS",
    "Baseline",
    "EditScores",
    "EndpointJudge",
    "Evaluator",
    "Judge",
    "JudgeConfig",
    "References",
]
