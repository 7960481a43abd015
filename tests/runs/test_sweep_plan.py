"""The plan of a sweep: what its cells would cost, with what they share counted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from everedit.experiments.sweeps import SweepConfig, cells_of
from everedit.experiments.sweeps.plan import plan_sweep
from everedit.models import LanguageModel
from tests.support import tiny
from tests.support.running import records, write_records
from tests.support.sweeping import plain, sweep_values


def test_each_model_is_timed_once_and_a_cell_without_a_plan_says_why(
    corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = sweep_values(write_records(tmp_path / "edits.jsonl", records(12)), corpus_path)
    values["models"] += [{"name": str(tiny.trained("llama")), "label": "other"}]
    values["models"] += [{"name": str(tmp_path / "nowhere"), "label": "lost"}]
    values["policies"] = ["accumulate", {"name": "nas", "set": {"policy_settings": {"samples": 3}}}]
    cells = cells_of(SweepConfig.parse(plain(values), "sweep.yaml"), "sweep.yaml")
    timed: list[str] = []

    def timing(lm: LanguageModel) -> float:
        timed.append(lm.name)
        return 1000.0

    monkeypatch.setattr("everedit.experiments.sweeps.plan.tokens_a_second", timing)
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "cache"))
    found = plan_sweep(cells)
    assert sorted(timed) == sorted(str(tiny.trained(family)) for family in ("gpt2", "llama"))
    assert [cell for cell, _, _ in found.cells] == cells
    planned, skipped = [], 0
    for cell, plan, note in found.cells:
        fits = cell.axes["method"] == "memit" or cell.axes["policy"] == "accumulate"
        skipped += not fits
        assert (plan is not None) == (fits and cell.axes["model"] != "lost")
        if plan is not None:
            planned.append(plan)
        else:
            assert ("solves for none" if not fits else "ModelError") in note
    assert (len(planned), skipped) == (6, 3)
    # Cells that differ in their policy alone share the statistics of their model.
    statistics = {plan.model["name"]: plan.seconds_statistics for plan in planned if plan.statistics_missing}
    assert len(statistics) == 2
    assert min(statistics.values()) > 0
    alone = sum(plan.seconds_total - plan.seconds_statistics for plan in planned)
    assert found.seconds == pytest.approx(alone + sum(statistics.values()), abs=0.11)
    assert found.memory_mb == max(plan.memory_mb for plan in planned)
