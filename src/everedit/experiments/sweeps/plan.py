"""What a sweep will do and about what it will cost, before it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everedit.errors import EvereditError
from everedit.experiments.plan import Plan, make_plan, tokens_a_second
from everedit.experiments.run import make_editor
from everedit.experiments.sweeps.cells import Cell
from everedit.models import LanguageModel, load_model
from everedit.reporting import Reporter, Silent

__all__ = ["SweepPlan", "plan_sweep"]

# A roll-back makes each edit and the edit that goes back.
_EDITS_A_FACT = {"run": 1, "rollback": 2}


@dataclass(frozen=True)
class SweepPlan:
    """The plan of each cell, or why there is none; ``seconds`` for all cells one after another, ``memory_mb`` for the
    largest. Statistics that cells share are counted once.
    """

    cells: tuple[tuple[Cell, Plan | None, str], ...]
    seconds: float
    memory_mb: float


def plan_sweep(cells: Sequence[Cell], kind: str = "run", reporter: Reporter | None = None) -> SweepPlan:
    """Return the plan of a sweep without running it; each model is loaded once and one short forward pass timed."""
    reporter = reporter or Silent()
    reporter.stage("planning", len(cells))
    found: list[tuple[Cell, Plan | None, str]] = []
    statistics: dict[str, float] = {}
    seconds = 0.0
    loaded: tuple[tuple[str, str | None, str | None], LanguageModel, float] | None = None
    # Cells of one model together, so that no more than one is held.
    for number, cell in enumerate(sorted(cells, key=lambda cell: cell.config.model), start=1):
        config, plan, note = cell.config, None, cell.skipped
        if not note:
            try:
                which = (config.model, config.device, config.dtype)
                if loaded is None or loaded[0] != which:
                    lm = load_model(config.model, device=config.device, dtype=config.dtype)
                    loaded = which, lm, tokens_a_second(lm)
                plan = make_plan(config, make_editor(loaded[1], config), loaded[2])
            except EvereditError as error:
                note = f"{type(error).__name__}: {error.what}"
        if plan is not None:
            seconds += (plan.seconds_total - plan.seconds_statistics) * _EDITS_A_FACT[kind]
            text = f"{config.model} {config.stats.model_dump_json()}"
            statistics[text] = max(statistics.get(text, 0.0), plan.seconds_statistics)
        found.append((cell, plan, note))
        reporter.step(number)
    order = {cell.name: place for place, cell in enumerate(cells)}
    found.sort(key=lambda entry: order[entry[0].name])
    memory = max((plan.memory_mb for _, plan, _ in found if plan is not None), default=0.0)
    return SweepPlan(tuple(found), round(seconds + sum(statistics.values()), 1), memory)
