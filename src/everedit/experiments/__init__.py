"""Experiments: a plan before, a run that can be interrupted and resumed, a summary that explains itself."""

from everedit.experiments.config import RunConfig, StatsConfig
from everedit.experiments.plan import Plan, make_plan
from everedit.experiments.rollback import rollback_run
from everedit.experiments.run import resume, start
from everedit.experiments.run_source import source_of_run
from everedit.reporting import Reporter

__all__ = [
    "Plan",
    "Reporter",
    "RunConfig",
    "StatsConfig",
    "make_plan",
    "resume",
    "rollback_run",
    "source_of_run",
    "start",
]
