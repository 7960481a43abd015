"""Recipes name what their sweeps make; claims against numbers chosen by hand; what is missing is said beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.errors import EditError, UnknownName
from everedit.evaluation import PROTOCOLS
from everedit.evaluation.ability import TASKS
from everedit.experiments.recipes import Recipe, conclude, recipe, recipe_names
from everedit.experiments.recipes.claims import Claim, Form, Line, Published, Spot, judged
from everedit.experiments.sweeps import Cell, cells_of
from everedit.report.collect import collect
from everedit.report.run_result import ROLLBACK
from tests.support.fake_runs import PROTOCOL, fake_run, fake_sweep

NAMES = ["alphaedit", "easyedit", "prune", "simie", "ultraedit", "wilke", "wise"]
GROWTH = {"norm_ratio", "singular_value_ratio"}
ROLLBACK_METRICS = {"ES", "GS", "LS", "ERS", "ORS", "S"}

ZSRE = {
    "subject": "Mira Lanner", "src": "Where does Mira Lanner live?", "alt": "Oslo", "answers": ["Lima"],
    "rephrase": "What is Mira Lanner's town?", "loc": "nq question: what is red", "loc_ans": "a colour",
}  # fmt: skip
COUNTERFACT = {
    "case_id": 1,
    "requested_rewrite": {
        "prompt": "{} lives in", "subject": "Mira Lanner", "target_new": {"str": "Oslo"}, "target_true": {"str": "Lima"}
    },
    "paraphrase_prompts": ["Yes. Mira Lanner lives in"], "neighborhood_prompts": ["Sol Lanner lives in"],
    "generation_prompts": ["Mira Lanner is"],
}  # fmt: skip
REDUCED = {
    "prompt": "Mira Lanner lives in", "subject": "Mira Lanner", "target_new": "Oslo", "ground_truth": "Lima",
    "rephrase_prompt": "Mira Lanner's town is", "locality_prompt": "Sol Lanner lives in",
    "locality_ground_truth": "Rome",
}  # fmt: skip
HALLUCINATION = {
    "text": "Mira", "concept": "Mira Lanner", "prompt": "Mira Lanner was a painter.",
    "target_new": "She lived in Oslo.",
    "subject": "Mira Lanner", "locality_prompt": "Red is", "locality_ground_truth": "a colour",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets with one record each, and a text."""
    root = tmp_path_factory.mktemp("data")
    files = {"zsre": ZSRE, "counterfact_full": COUNTERFACT, "counterfact": REDUCED, "hallucination": HALLUCINATION}
    for name, record in files.items():
        (root / name).mkdir()
        (root / name / "edit.jsonl").write_text(json.dumps({"id": f"{name}-1", **record}) + "\n")
    (root / "text").mkdir()
    (root / "text" / "wikipedia_sample.jsonl").write_text('{"text": "Red is a colour."}\n')
    return root


def made(name: str, form: Form, data: Path, **options: Any) -> tuple[Recipe, list[Cell]]:
    found = recipe(name)
    checkpoints = dict.fromkeys(found.trained, data)
    ready = found.ready(name, form, data=data, checkpoints=checkpoints, **options)
    return found, cells_of(ready.sweep, name)


# --------------------------------------------------------------------------- the shipped ones


def test_there_is_one_for_each_headline_table() -> None:
    assert recipe_names() == NAMES
    with pytest.raises(UnknownName, match="did you mean alphaedit"):
        recipe("alphaedt")


@pytest.mark.parametrize("form", ["full", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_sweeps_whose_every_setting_is_known(name: str, form: Form, data: Path) -> None:
    _, cells = made(name, form, data)
    going = [cell for cell in cells if not cell.skipped]
    assert going
    assert {str(cell.config.stats.corpus) for cell in going} == {str(data / "text" / "wikipedia_sample.jsonl")}
    models = {cell.config.model for cell in going}
    assert (models == {"smollm2-135m"}) == (form == "small")


@pytest.mark.parametrize("form", ["full", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_every_claim_is_about_a_number_that_the_sweep_makes(name: str, form: Form, data: Path) -> None:
    found, cells = made(name, form, data)
    spots = []
    for claim in (claim.in_form(form) for claim in found.claims if form in claim.forms):
        spots += [spot for spot in (claim.of, claim.above, claim.below) if isinstance(spot, Spot)]
    if form == "full":
        for table in found.published:
            for row in table.rows:
                for mark, metric in ((mark, metric) for mark in row.at for metric in table.metrics):
                    about = {"protocol": table.protocol, "model": table.model, "data": table.data}
                    spots.append(Spot(method=row.method, policy=row.policy, metric=metric, at=mark, **about))
    assert spots
    for spot in spots:
        meant = [
            cell
            for cell in cells
            if not cell.skipped
            and spot.model in ("", cell.axes["model"])
            and spot.data in ("", cell.axes["data"])
            and (spot.method == "unedited" or (cell.axes["method"], cell.axes["policy"]) == (spot.method, spot.policy))
        ]
        assert meant, spot
        for cell in meant:
            assert not isinstance(spot.at, int) or spot.at in cell.config.checkpoints, spot
        if spot.protocol == ROLLBACK or (not spot.protocol and name == "wilke"):
            assert spot.metric in ROLLBACK_METRICS
        elif spot.protocol in TASKS:
            assert all(cell.config.ability and spot.protocol in cell.config.ability.tasks for cell in meant), spot
            assert spot.metric in (*TASKS[spot.protocol].columns, *TASKS[spot.protocol].derived), spot
        elif spot.metric not in GROWTH:
            protocols = [spot.protocol] if spot.protocol else meant[0].config.protocols
            assert set(protocols) <= set(meant[0].config.protocols), spot
            assert any(spot.metric in PROTOCOLS[protocol].columns for protocol in protocols), spot


def test_published_numbers_are_shares_or_scales_of_their_own() -> None:
    for name in NAMES:
        for table in recipe(name).published:
            values = [
                value for row in table.rows for numbers in row.at.values() for value in numbers if value is not None
            ]
            if set(table.metrics).isdisjoint({"perplexity", "fluency"}):
                assert all(0 <= value <= 1 for value in values), table.table


def test_what_a_recipe_needs_is_said_before_anything_is_made(data: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"needs the data sets zsre, hallucination(?s:.*)--data FOLDER"):
        recipe("wise").ready("wise", "full")
    with pytest.raises(EditError, match="needs the data sets counterfact-full"):
        recipe("prune").ready("prune", "small")
    ready = recipe("wise").ready("wise", "small")
    assert [entry.name for entry in ready.sweep.data] == ["worldfacts"]
    assert any("worldfacts instead of zsre" in note for note in ready.notes)
    assert any("text sampled from the model" in note for note in ready.notes)
    assert any("trained first: mend" in note for note in ready.notes)
    with pytest.raises(EditError, match=r"takes no checkpoint for 'rome'(?s:.*)it takes: mend"):
        recipe("wise").ready("wise", "small", checkpoints={"rome": tmp_path})
    result = CliRunner().invoke(app, ["reproduce", "wise", "--small", "--checkpoint", "mend"])
    assert result.exit_code == 1
    assert "NAME=FOLDER" in result.stderr


def test_models_and_checkpoints_take_part(data: Path) -> None:
    ready = recipe("wise").ready(
        "wise", "small", data=data, models=["one", "two"], checkpoints={"mend": Path("runs/mend")}
    )
    cells = cells_of(ready.sweep, "wise")
    assert {cell.config.model for cell in cells} == {"one", "two"}
    assert [c.config.method_settings for c in cells if c.config.method == "mend"] == [{"checkpoint": "runs/mend"}] * 2


def test_the_command_lists_them() -> None:
    told = json.loads(CliRunner().invoke(app, ["reproduce", "--json"]).stdout)
    assert list(told) == NAMES
    assert all(entry["paper"] and entry["about"] for entry in told.values())
    text = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["reproduce"]).stdout
    assert "WISE, Table 2" in text


# --------------------------------------------------------------------------- claims


@pytest.fixture
def results(tmp_path: Path) -> list[Any]:
    """ROME falls from 1 to 0.25, with SimIE it stays at 0.75."""
    fake_run(tmp_path / "a", [1, 1, 1, 1], {1: [1], 4: [1, 0, 0, 0]}, method="rome", growth={1: 1.2, 4: 3.0})
    fake_run(tmp_path / "b", [1, 1, 1, 1], {1: [1], 4: [1, 1, 1, 0]}, method="rome", policy="simie", locality=0.9)
    return collect([tmp_path])


def line(results: list[Any], form: Form = "full", **claim: Any) -> Line:
    [found] = judged([Claim.model_validate({"says": "so", **claim})], [], results, form)
    return found


ROME = {"method": "rome", "metric": "reliability"}
SIMIE = {**ROME, "policy": "simie"}


def test_a_claim_by_hand(results: list[Any]) -> None:
    found = line(results, of=SIMIE, above=ROME, by=0.3)
    assert found.expected == "above 0.250 (ROME, reliability at the end) by 0.3"
    assert found.found.startswith("0.750 [")
    assert found.found.endswith("(ROME + SimIE, reliability at the end)")
    assert (found.where, found.verdict) == ("tiny, towns", "as expected")


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ({"of": SIMIE, "above": ROME, "by": 0.5}, "as expected"),  # exactly
        ({"of": SIMIE, "above": ROME, "by": 0.51}, "not as expected"),
        ({"of": ROME, "below": {**ROME, "at": "first"}, "by": 0.5}, "as expected"),
        ({"of": ROME, "above": SIMIE}, "not as expected"),
        ({"of": ROME, "above": SIMIE, "by": -0.5}, "as expected"),  # no more than 0.5 below
        ({"of": ROME, "above": SIMIE, "by": -0.4}, "not as expected"),
        ({"of": ROME, "above": 0.25}, "not as expected"),  # not above itself
        ({"of": {**ROME, "at": 4}, "below": 0.3}, "as expected"),
        ({"of": {**ROME, "when": "immediate"}, "above": 0.9}, "as expected"),
        ({"of": {"method": "rome", "metric": "norm_ratio"}, "above": 2.5}, "as expected"),
        ({"of": {"method": "unedited", "metric": "locality"}, "above": {**SIMIE, "metric": "locality"}}, "as expected"),
        ({"of": {**ROME, "at": 2}, "above": 0}, "not measured"),
        ({"of": {**ROME, "method": "wise"}, "above": 0}, "not measured"),
        ({"of": ROME, "above": {**ROME, "method": "wise"}}, "not measured"),
        ({"of": {**ROME, "metric": "colour"}, "above": 0}, "not measured"),
        ({"of": {**ROME, "model": "large"}, "above": 0}, "not measured"),
    ],
)
def test_verdicts(claim: dict[str, Any], verdict: str, results: list[Any]) -> None:
    assert line(results, **claim).verdict == verdict


def test_a_margin_the_other_way_is_said_in_words(results: list[Any]) -> None:
    said = line(results, of=ROME, above=SIMIE, by=-0.1).expected
    assert said == "no more than 0.1 below 0.750 (ROME + SimIE, reliability at the end)"


def test_the_small_form_may_ask_for_less(results: list[Any]) -> None:
    claim = {"of": SIMIE, "above": ROME, "by": 0.6, "small": {"by": 0.1}}
    assert line(results, "full", **claim).verdict == "not as expected"
    assert line(results, "small", **claim).verdict == "as expected"
    assert judged([Claim.model_validate({"says": "so", **claim, "forms": ["full"]})], [], results, "small") == []


def test_a_claim_is_made_of_every_model(results: list[Any], tmp_path: Path) -> None:
    fake_run(tmp_path / "c", [1, 1], {2: [1, 1]}, method="rome", model="some/large")
    both = collect([tmp_path])
    found = judged([Claim.model_validate({"says": "so", "of": ROME, "above": 0.5})], [], both, "full")
    assert [(one.where, one.verdict) for one in found] == [
        ("tiny, towns", "not as expected"), ("large, towns", "as expected"),
    ]  # fmt: skip


def test_published_numbers_agree_within_their_tolerance(results: list[Any]) -> None:
    rows = [
        {"method": "rome", "at": {4: [0.3, 1.0]}},
        {"method": "rome", "policy": "simie", "at": {"last": [0.5, None]}},
    ]
    about = {"table": "Table 1", "model": "tiny", "data": "towns", "protocol": PROTOCOL, "within": 0.1}
    table = Published.model_validate({**about, "metrics": ["reliability", "locality"], "rows": rows})
    found = judged([], [table], results, "full")
    assert [(one.expected, one.verdict) for one in found] == [
        ("0.300 ± 0.1", "as expected"), ("1.000 ± 0.1", "as expected"), ("0.500 ± 0.1", "not as expected"),
    ]  # fmt: skip
    # Of a model of another size no published number can be expected.
    small = judged([], [table.model_copy(update={"model": "large"})], results, "small")
    assert [(one.expected, one.verdict) for one in small] == [
        ("0.300 (large)", "another model"), ("1.000 (large)", "another model"), ("0.500 (large)", "another model"),
    ]  # fmt: skip
    with pytest.raises(ValidationError, match="1 numbers for 2 metrics"):
        Published.model_validate({**about, "metrics": ["a", "b"], "rows": [{"method": "rome", "at": {1: [1]}}]})


def test_a_claim_without_a_bound_is_none(results: list[Any]) -> None:
    for bounds in ({}, {"above": 1, "below": 0}):
        with pytest.raises(ValidationError, match="above or below"):
            Claim.model_validate({"says": "so", "of": ROME, **bounds})


def test_the_lines_are_kept_and_stand_on_the_page(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    axes = {"model": "tiny", "data": "towns", "method": "rome", "policy": "accumulate", "seed": "0"}
    fake_run(tmp_path / "s" / "cells" / "x", [1, 0], {1: [1], 2: [1, 0]}, method="rome")
    fake_sweep(tmp_path / "s", {"x": {"axes": axes}})
    lines = conclude(recipe("wise"), "wise", "small", tmp_path / "s", ["a note"])
    kept = json.loads((tmp_path / "s" / "reproduction.json").read_text())
    assert (kept["recipe"], kept["form"], kept["notes"]) == ("wise", "small", ["a note"])
    assert kept["lines"] == [one.as_dict() for one in lines]
    assert lines[0].verdict == "as expected"  # from 1 to 0.5
    assert {one.verdict for one in lines[1:]} == {"not measured"}
    from everedit.report import write_sweep_report

    page = write_sweep_report(tmp_path / "s").read_text()
    assert "Expected and found" in page
    assert '<td class="as-expected">as expected</td>' in page
