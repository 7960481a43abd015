"""Curves and the page of a sweep: the right series in SVG, every cell on record, and text that stays text."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.errors import RunFolderError
from everedit.report import write_sweep_report
from everedit.report.collect import collect
from everedit.report.line_figures import Drawn
from everedit.report.sweep_figures import figures, save_figures
from everedit.uncertainty import bootstrap_interval
from tests.support.fake_runs import PROTOCOL, fake_run, fake_sweep
from tests.unit.test_report import Tables

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    fake_run(tmp_path / "a0", [1, 1, 1, 0], {1: [1], 2: [1, 0.5], 4: [0, 0, 1, 0]}, growth={1: 1.1, 2: 1.3, 4: 1.9})
    fake_run(tmp_path / "a1", [1, 1, 0, 0], {1: [0], 2: [1, 1], 4: [0, 0, 1, 1]}, seed=1)
    fake_run(tmp_path / "b0", [1, 1, 1, 1], {1: [1], 2: [1, 1], 4: [1, 1, 0.5, 1]}, policy="simie", locality=0.9)
    return tmp_path


def drawn(folder: Path, start: str) -> Drawn:
    return next(one for one in figures(collect([folder])) if one.heading.startswith(start))


def series(one: Drawn) -> dict[str, list[tuple[float, float]]]:
    """Every line of a figure: by its name, the points that it is drawn through."""
    lines = [line for axes in one.figure.axes for line in axes.get_lines()]
    return {str(line.get_gid()): [(float(x), float(y)) for x, y in line.get_xydata()] for line in lines}


def test_curves_go_through_the_means(runs: Path) -> None:
    found = series(drawn(runs, "Scores"))
    assert found["series-reliability-memit"] == [(1, 0.5), (2, 0.875), (4, 0.375)]
    assert found["series-reliability-memit-simie"] == [(1, 1), (2, 1), (4, 0.875)]
    assert found["series-locality-memit-simie"] == [(1, 0.9), (2, 0.9), (4, 0.9)]
    # What was never measured has no panel.
    assert {name.split("-")[1] for name in found} == {"reliability", "locality"}


def test_bands_are_the_bootstrap_intervals(runs: Path) -> None:
    figure = drawn(runs, "Scores").figure
    bands = {band.get_gid(): band for axes in figure.axes for band in axes.collections}
    corners = {(float(x), float(y)) for x, y in bands["band-reliability-memit"].get_paths()[0].vertices}
    # One edit has no interval; at T=2 and T=4 it is over both seeds.
    for mark, samples in ((2, [[1, 0.5], [1, 1]]), (4, [[0, 0, 1, 0], [0, 0, 1, 1]])):
        assert {(mark, end) for end in bootstrap_interval(samples)} <= corners
    assert min(x for x, _ in corners) == 2


def test_retention_follows_the_first_edits(runs: Path) -> None:
    one = drawn(runs, "What is retained of the first 2 edits")
    # Of the first two: at T=2 (0.75 + 1) / 2, at T=4 nothing; with SimIE all of it.
    found = series(one)
    assert found[next(name for name in found if name.endswith("memit"))] == [(2, 0.875), (4, 0)]
    assert found[next(name for name in found if name.endswith("simie"))] == [(2, 1), (4, 1)]


def test_growth_is_that_of_the_matrix_that_grew_most(runs: Path) -> None:
    found = series(drawn(runs, "Growth"))
    assert found["series-norm-memit"] == [(1, 1.3), (2, 1.4), (4, 1.7)]
    assert found["series-largest-singular-value-memit-simie"] == [(1, 2), (2, 2), (4, 2)]


def test_general_ability_is_drawn_with_the_unedited_model(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", [1, 1], {1: [1], 2: [1, 1]}, ability={0: 0.8, 1: 0.7, 2: 0.4})
    one = drawn(tmp_path, "General ability")
    [panel] = one.figure.axes
    line, reference = panel.get_lines()
    assert [tuple(map(float, pair)) for pair in line.get_xydata()] == [(1, 0.7), (2, 0.4)]
    assert set(reference.get_ydata()) == {0.8}
    assert [text.get_text() for text in one.figure.legends[0].get_texts()] == ["MEMIT"]
    assert not [other for other in figures(collect([tmp_path])) if "nli" in other.heading]


def test_time_and_memory_leave_scoring_out(runs: Path) -> None:
    one = drawn(runs, "Time and memory")
    seconds, memory = ([bar.get_width() for bar in axes.patches] for axes in one.figure.axes)
    assert seconds == [2.0, 2.0]
    assert memory == [1100.0, 1100.0]


def test_many_lines_are_drawn_method_by_method(tmp_path: Path) -> None:
    for method in ("memit", "rome", "ft"):
        for policy in ("accumulate", "simie", "nas+prune"):
            fake_run(tmp_path / f"{method}-{policy}", [1, 1], {2: [1, 0]}, method=method, policy=policy)
    found = [one for one in figures(collect([tmp_path])) if one.heading.startswith("Reliability")]
    [one] = found
    assert [axes.get_title(loc="left") for axes in one.figure.axes] == ["FT", "MEMIT", "ROME"]
    assert [text.get_text() for text in one.figure.legends[0].get_texts()] == ["alone", "NAS + PRUNE", "SimIE"]
    assert len(series(one)) == 9


def test_files_are_svg_with_named_series(runs: Path, tmp_path: Path) -> None:
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["plot", str(runs), "--out", str(tmp_path / "plots")])
    assert result.exit_code == 0, result.stderr
    files = [Path(line) for line in result.stdout.split()]
    assert sorted(file.name for file in files) == sorted(file.name for file in (tmp_path / "plots").iterdir())
    curves = next(file for file in files if file.name.startswith("scores-"))
    root = ET.parse(curves).getroot()
    groups = {group.get("id"): group for group in root.iter(f"{SVG}g") if group.get("id")}
    for name, heights in (("memit", (0.5, 0.875, 0.375)), ("memit-simie", (1, 1, 0.875))):
        path = groups[f"series-reliability-{name}"].find(f"{SVG}path")
        assert path is not None
        places = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d") or "")]
        # On paper up is down: height is an affine map of the value, the same for both lines.
        slope = (places[1][1] - places[2][1]) / (heights[1] - heights[2])
        assert slope < 0
        assert places[0][1] - places[1][1] == pytest.approx(slope * (heights[0] - heights[1]), abs=0.01)
    assert save_figures(collect([runs]), tmp_path / "again") != []
    assert (tmp_path / "again" / curves.name).read_bytes() == curves.read_bytes()


# --------------------------------------------------------------------------- the page


def axes(method: str, **changes: str) -> dict[str, Any]:
    return {
        "axes": {"model": "tiny", "data": "towns", "method": method, "policy": "accumulate", "seed": "0", **changes}
    }


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    cells = tmp_path / "sweep" / "cells"
    fake_run(cells / "good", [1, 1], {1: [1], 2: [1, 0.5]})
    (cells / "good" / "report.html").write_text("a page")
    fake_run(cells / "half", [1], {1: [1]}, method="rome", finished=False)
    (cells / "bad").mkdir()
    error = {"error": "EditError", "what": "<b>bold</b> words", "where": "a file", "fix": "mend it"}
    (cells / "bad" / "error.json").write_text(json.dumps(error))
    listed = {
        "good": axes("memit"), "half": axes("rome"), "bad": axes("ft"),
        "never": {**axes("grace"), "skipped": "grace knows no weights"}, "later": axes("wise"),
    }  # fmt: skip
    return fake_sweep(tmp_path / "sweep", listed, title="A <i>sweep</i>")


def test_the_page_tells_of_every_cell(sweep: Path) -> None:
    page = write_sweep_report(sweep).read_text(encoding="utf-8")
    assert "1 done, 2 unfinished, 1 failed, 1 skipped" in page
    found = Tables(page)
    cells = next(table for table in found.tables if table[0][0] == "method" and "run folder" in table[0])
    assert [row[:3] for row in cells[1:]] == [
        ["memit", "done", "good"], ["rome", "unfinished", "half"], ["ft", "failed", "bad"],
        ["grace", "skipped", "never"], ["wise", "unfinished", "later"],
    ]  # fmt: skip
    assert "EditError: &lt;b&gt;bold&lt;/b&gt; words (a file). What to do: mend it" in page
    assert [value for tag, name, value in found.attributes if (tag, name) == ("a", "href")] == [
        "cells/good/report.html"
    ]
    assert "methods: [memit]" in page


def test_the_page_holds_the_tables_and_the_curves(sweep: Path) -> None:
    page = write_sweep_report(sweep).read_text(encoding="utf-8")
    scores = Tables(page).tables[0]
    assert scores[0] == ["", "T = 1", "T = 2"]
    assert scores[1] == ["method", "Rel", "Loc", "Rel", "Loc"]
    assert scores[2:] == [
        ["unedited", "0.000", "1.000", "0.000", "1.000"],
        ["MEMIT", "1.000", "1.000", "0.750", "1.000"],
        ["ROME (unfinished)", "1.000", "1.000", "–", "–"],
    ]
    assert PROTOCOL in page
    assert page.count("<svg") == len(figures(collect([sweep])))


def test_the_page_needs_no_network_and_its_ids_are_unique(sweep: Path) -> None:
    page = write_sweep_report(sweep).read_text(encoding="utf-8")
    assert "<i>sweep</i>" not in page
    assert "http" not in page
    assert "<script" not in page
    ids = [value for _, name, value in Tables(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_sweep_that_has_not_begun_has_a_page_and_no_sweep_has_none(tmp_path: Path) -> None:
    page = write_sweep_report(fake_sweep(tmp_path / "sweep", {"later": axes("memit")})).read_text()
    assert "No scores are on record" in page
    with pytest.raises(RunFolderError, match="no sweep here"):
        write_sweep_report(tmp_path)
    assert "report.html" in CliRunner(env={"COLUMNS": "300"}).invoke(app, ["report", str(tmp_path / "sweep")]).stdout


def test_growth_by_orders_of_magnitude_is_drawn_as_such(runs: Path, tmp_path: Path) -> None:
    fake_run(tmp_path / "wild" / "w0", [1, 0], {1: [1], 2: [0, 0]}, growth={1: 4.0, 2: 1e6})
    norm, largest = drawn(tmp_path / "wild", "Growth").figure.axes
    assert (norm.get_yscale(), largest.get_yscale()) == ("log", "linear")
    assert {axes.get_yscale() for axes in drawn(runs / "a0", "Growth").figure.axes} == {"linear"}
