"""What runs find on the unedited model they find once, with the bits and the seconds of finding it each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everedit import experiments
from everedit.editor import PREFETCH
from everedit.engine import target
from tests.support.editing import BASE_MODE
from tests.support.running import Interrupting, records, rows_of, run_config, same_results, without_times, write_records

pytestmark = pytest.mark.usefixtures("own_cache")

N = PREFETCH + 2


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many edits' values were optimised together, call by call."""
    counts: list[int] = []
    theirs = target.optimise_rows

    def counting(lm: Any, rows: Any, *arguments: Any, **options: Any) -> Any:
        counts.append(len(rows))
        return theirs(lm, rows, *arguments, **options)

    monkeypatch.setattr(target, "optimise_rows", counting)
    return counts


def config_of(tmp_path: Path, corpus: Path, **changes: Any) -> experiments.RunConfig:
    data = write_records(tmp_path / "edits.jsonl", records(N))
    options = {"policy": "simie", "policy_settings": BASE_MODE, "edits": N, "checkpoints": (), **changes}
    return run_config(data, corpus, **options)


def seconds_of(folder: Path) -> list[float]:
    return [row["seconds"].get("target", 0.0) for row in rows_of(folder) if row["kind"] == "edit"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Another solution of the same problem, another method with the same values, and edits that are taken back.
        ({}, {"policy_settings": {**BASE_MODE, "lam": 1e-2}}),
        ({"method": "rome"}, {"method": "r-rome"}),
        ({}, {"policy": "accumulate", "policy_settings": {}, "single": True}),
    ],
    ids=["policy", "method", "single"],
)
def test_the_second_run_finds_what_the_first_has_found(
    first: dict[str, Any], second: dict[str, Any], corpus_path: Path, tmp_path: Path, solved: list[int]
) -> None:
    shared = tmp_path / "shared"
    experiments.start(config_of(tmp_path, corpus_path, **first), tmp_path / "first", shared=shared)
    assert solved == [PREFETCH, N - PREFETCH]
    config = config_of(tmp_path, corpus_path, **second)
    experiments.start(config, tmp_path / "second", shared=shared)
    assert len(solved) == 2
    assert seconds_of(tmp_path / "second") == pytest.approx(seconds_of(tmp_path / "first"), abs=0.02)
    assert sum(seconds_of(tmp_path / "second")) > 0
    # Alone it would have the same bits.
    experiments.start(config, tmp_path / "alone")
    assert len(solved) == 4
    assert without_times(rows_of(tmp_path / "second")) == without_times(rows_of(tmp_path / "alone"))
    if not config.single:
        # Single edits are taken back: they leave no weights.
        same_results(tmp_path / "second", tmp_path / "alone")


def test_other_settings_other_values_and_an_edited_model_keeps_none(
    corpus_path: Path, tmp_path: Path, solved: list[int]
) -> None:
    shared = tmp_path / "shared"
    base = config_of(tmp_path, corpus_path, edits=2)
    experiments.start(base, tmp_path / "first", shared=shared)
    files = set((shared / "values").iterdir())
    assert (len(files), len(solved)) == (1, 1)
    settings = {**base.method_settings, "target": {**base.method_settings["target"], "lr": 0.4}}
    experiments.start(base.model_copy(update={"method_settings": settings}), tmp_path / "other", shared=shared)
    assert (len(list((shared / "values").iterdir())), len(solved)) == (2, 2)
    # Values of a stream that edits the model as it is belong to that stream alone.
    current = base.model_copy(update={"policy": "accumulate", "policy_settings": {}})
    experiments.start(current, tmp_path / "current", shared=shared)
    assert (len(list((shared / "values").iterdir())), len(solved)) == (2, 4)


def test_a_damaged_file_is_found_again(corpus_path: Path, tmp_path: Path, solved: list[int]) -> None:
    shared, config = tmp_path / "shared", config_of(tmp_path, corpus_path, edits=2)
    experiments.start(config, tmp_path / "first", shared=shared)
    [file] = (shared / "values").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    experiments.start(config, tmp_path / "again", shared=shared)
    assert len(solved) == 2
    same_results(tmp_path / "first", tmp_path / "again")
    experiments.start(config, tmp_path / "third", shared=shared)
    assert len(solved) == 2


def test_an_interrupted_run_goes_on_with_what_is_kept(corpus_path: Path, tmp_path: Path, solved: list[int]) -> None:
    shared, config = tmp_path / "shared", config_of(tmp_path, corpus_path)
    experiments.start(config, tmp_path / "first", shared=shared)
    with pytest.raises(KeyboardInterrupt):
        experiments.start(config, tmp_path / "cut", reporter=Interrupting(3), shared=shared)
    experiments.resume(tmp_path / "cut", shared=shared)
    assert len(solved) == 2
    same_results(tmp_path / "first", tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["edits"] == N
