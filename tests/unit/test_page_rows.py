"""A page made of the numbers in a CSV file says what the tables of the runs themselves say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import page_rows, sweep_pages
from benchmarks.page_rows import ABILITY, SINGLE, Row
from benchmarks.sweep_pages import SWEEPS
from everedit.experiments import RunConfig
from everedit.experiments.sweeps import Cell, SweepConfig
from everedit.methods import method_class
from everedit.report.collect import collect
from everedit.report.sweep_figures import save
from everedit.report.tables import markdown, tables
from tests.support.fake_runs import PROTOCOL, fake_run


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """What a file holds of two methods' streams, of 120 edits, and of one run of single edits."""
    fall = {1: [1.0], 10: [1.0, 0.5] * 5, 120: [1.0, 0.0] * 60}
    ability = {0: 0.5, 1: 0.5, 10: 0.4, 120: 0.3}
    fake_run(tmp_path / "runs" / "a", [1] * 120, fall, growth={1: 1.1, 10: 1.3, 120: 1.9}, ability=ability)
    fake_run(tmp_path / "runs" / "b", [1] * 10, {1: [1], 10: [1] * 9 + [0]}, policy="simie", locality=0.9)
    fake_run(tmp_path / "runs" / "c", [1, 0], {2: [1, 0]}, method="rome", single=True)
    page_rows.write(
        tmp_path / "page.csv", [row for run in collect([tmp_path / "runs"]) for row in page_rows.rows_of(run)]
    )
    return page_rows.read(tmp_path / "page.csv")


@pytest.mark.parametrize("when", ["retained", "uncontradicted", "immediate"])
def test_tables_are_those_of_the_runs(rows: list[Row], tmp_path: Path, when: str) -> None:
    runs = [run for run in collect([tmp_path / "runs"]) if not run.single]
    for interval in (False, True):
        theirs = markdown(tables(runs, when, [PROTOCOL]), interval=interval)  # type: ignore[arg-type]
        assert markdown(page_rows.tables_of(rows, when), interval=interval) == theirs
    assert "MEMIT + SimIE" in theirs


def test_single_edits_ability_and_the_first_hundred_are_tables_of_their_own(rows: list[Row]) -> None:
    [single] = page_rows.tables_of(rows, SINGLE)
    assert single.single
    assert dict(single.rows)["ROME"][2, "reliability"].value == 0.5
    [ability] = page_rows.tables_of(rows, ABILITY)
    assert ability.ability
    assert dict(ability.rows)["MEMIT"][120, "accuracy"].value == 0.3
    assert dict(ability.rows)["unedited"][120, "accuracy"].value == 0.5
    [first] = page_rows.tables_of(rows, "first_100")
    # Up to a hundred edits it is what the table of all says.
    assert first.marks == [120]
    assert dict(first.rows)["MEMIT"][120, "reliability"].value == 0.5


def test_costs_and_growth_are_kept(rows: list[Row]) -> None:
    assert "| MEMIT | 2.00 | 1,100 |" in page_rows.costs_of(rows)
    grown = [(row.T, row.value) for row in rows if (row.protocol, row.metric) == ("growth", "norm_ratio")]
    assert grown[:3] == [(1, 1.1), (10, 1.3), (120, 1.9)]


def test_growth_is_told_for_every_method_that_grew(rows: list[Row]) -> None:
    lines = page_rows.growth_of(rows)
    assert lines[1] == "**tiny, towns**"
    table = {
        cells[0]: cells[1:] for line in lines[3:] if (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    assert table["method"][:2] == ["T=1 norm", "T=1 top σ"]
    assert table["MEMIT"][0::2] == ["1.10", "–", "1.30", "1.90"]
    # Its stream was shorter.
    assert table["MEMIT + SimIE"][-1] == "–"


def test_a_roll_back_tells_how_its_updates_grew(tmp_path: Path) -> None:
    scores = {"ES": 1.0, "GS": 0.5, "LS": 0.5, "ERS": 0.5, "ORS": 1.0, "S": 0.6}
    found = {"checkpoints": {"1": scores, "8": scores}, "sizes": [1.0], "flashes": [3, 5], "buildup": 2.5}
    config = {"model": "tiny", "data": "towns", "method": "wilke", "policy": "accumulate"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rollback.json").write_text(json.dumps({"config": config, **found}), encoding="utf-8")
    rows = [row for run in collect([tmp_path]) for row in page_rows.rows_of(run)]
    [table] = page_rows.tables_of(rows, "retained")
    assert dict(table.rows)["WilKE"][8, "ERS"].value == 0.5
    assert page_rows.growth_of(rows)[-3:] == [
        "| method | T=8 flashes | T=8 buildup |",
        "| --- | ---: | ---: |",
        "| WilKE | 2.00 | 2.50 |",
    ]


def test_both_rows_of_a_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_pages, "KEPT", tmp_path)
    made = tmp_path / "page" / "cells"
    fake_run(made / "one", [1, 1], {2: [1, 1]}, policy="prune", beneath=0.25)
    fake_run(made / "half", [1, 1], {2: [1, 1]}, method="ft", finished=False)
    called = {"one": "My MEMIT", "half": "FT", "nowhere": "FT"}
    cells = [Cell(name, {"method": method}, RunConfig()) for name, method in called.items()]
    found = sweep_pages.finished("page", cells)
    assert found.keys() == {"one"}
    [table] = page_rows.tables_of(found["one"], "retained")
    values = {name: entries[2, "reliability"].value for name, entries in table.rows}
    assert values == {"unedited": 0.0, "My MEMIT + PRUNE": 1.0, "My MEMIT": 0.25}


def test_a_page_shows_what_another_one_measured_where_both_have_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(tmp_path / "own" / "a", [1] * 20, {10: [1] * 10, 20: [1] * 20}, method="ft")
    fake_run(tmp_path / "other" / "b", [1] * 10, {5: [1] * 5, 10: [1, 0] * 5})
    fake_run(tmp_path / "other" / "c", [1] * 10, {10: [0] * 10}, method="rome")
    own, other = (
        [row for run in collect([tmp_path / one]) for row in page_rows.rows_of(run)] for one in ("own", "other")
    )
    page_rows.write(tmp_path / "other.csv", other)
    monkeypatch.setattr(sweep_pages, "BESIDE", {"own": {"other": ("MEMIT",)}})
    shown = [*own, *sweep_pages.beside("own", own, tmp_path)]
    [table] = page_rows.tables_of(shown, "retained")
    assert table.marks == [10, 20]
    assert {name: entries[10, "reliability"].value for name, entries in table.rows} == {
        "unedited": 0,
        "FT": 1,
        "MEMIT": 0.5,
    }
    # What an edit cost is told of streams of any length.
    assert "| MEMIT | 2.00 | 1,000 |" in page_rows.costs_of(shown)
    assert not sweep_pages.beside("another", own, tmp_path)


def test_seeds_are_averaged(tmp_path: Path) -> None:
    for seed, last in enumerate((0.0, 1.0)):
        fake_run(tmp_path / f"s{seed}", [1, 1], {2: [1, last]}, seed=seed)
    rows = [row for run in collect([tmp_path]) for row in page_rows.rows_of(run)]
    [table] = page_rows.tables_of(rows, "retained")
    entry = dict(table.rows)["MEMIT"][2, "reliability"]
    assert (entry.value, entry.seeds, entry.low) == (0.75, 2, None)
    assert entry.deviation == pytest.approx(0.5 / 2**0.5)


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_page_is_a_sweep(file: Path) -> None:
    sweep = SweepConfig.read(file)
    assert sweep.title
    for method in sweep.methods:
        # Where a rule adds what else is needed, what is set here must still be known.
        known = method_class(method.name).Config.model_fields
        assert {key.removeprefix("method.") for key in method.set if key.startswith("method.")} <= set(known)


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_page_finds_all_its_data_in_one_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "elsewhere"
    data.mkdir()
    text = sweep_pages.placed(file.stem, data).read_text(encoding="utf-8")
    assert (".benchmarks/data" in text) == ("DATA" in file.read_text(encoding="utf-8"))
    assert "DATA" not in text


def test_curves_are_drawn(rows: list[Row], tmp_path: Path) -> None:
    drawn = page_rows.curves_of(rows)
    assert [PROTOCOL in one.heading for one in drawn] == [True, False]
    image = save(drawn[0], tmp_path).read_text()
    assert all(f"series-{metric}-memit-simie" in image for metric in ("reliability", "locality"))


def _rows(folder: Path) -> list[Row]:
    return [row for run in collect([folder]) for row in page_rows.rows_of(run)]


def test_many_lines_get_a_panel_for_each_method_unless_each_method_has_one(tmp_path: Path) -> None:
    def drawn(methods: list[str], policies: list[str], folder: Path) -> list[str]:
        for method in methods:
            for policy in policies:
                fake_run(folder / f"{method}-{policy}", [1], {1: [1.0]}, method=method, policy=policy)
        return [one.slug for one in page_rows.curves_of(_rows(folder))]

    nine = ["memit", "rome", "ft", "ft-m", "ft-l", "lora", "emmet", "pmet", "kn"]
    place = "tiny-towns-teacher-forced-token-accuracy-1"
    assert drawn(nine, ["accumulate"], tmp_path / "one") == [f"scores-{place}"]
    split = drawn(nine[:5], ["accumulate", "simie"], tmp_path / "two")
    assert split == [f"{metric}-{place}" for metric in ("reliability", "locality")]
    [image] = [one for one in page_rows.curves_of(_rows(tmp_path / "two")) if one.slug == split[0]]
    assert [axes.get_title(loc="left") for axes in image.figure.axes] == ["FT", "FT-L", "FT-M", "MEMIT", "ROME"]
    assert [line.get_label() for line in image.figure.axes[0].get_lines()] == ["alone", "SimIE", "unedited"]


def test_a_page_of_single_edits_has_their_table_and_no_curves(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    fake_run(runs / "c", [1, 0], {2: [1, 0]}, method="rome", single=True)
    rows = [row for result in collect([runs]) for row in page_rows.rows_of(result)]
    text = "\n".join(sweep_pages.page("singles", rows, 0, out))
    table = text.split("## Single edits, each taken back before the next")[1].split("##")[0]
    assert re.search(r"\| ROME \| 0\.500 \|", table)
    assert "What an edit costs" in text
    assert "Curves" not in text
    assert "with the model as it is after T" not in text
