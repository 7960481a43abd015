"""A claim held against a page's numbers finds what it finds in the runs that the page was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import page_rows, shapes
from benchmarks.sweep_pages import SWEEPS
from everedit.experiments.config import read_yaml
from everedit.experiments.recipes.claims import Claim, judged
from everedit.report.collect import collect
from tests.support.fake_runs import fake_run

PLAIN, WITH = {"method": "memit"}, {"method": "memit", "policy": "simie"}


@pytest.mark.parametrize(
    ("of", "bound"),
    [
        ({**PLAIN, "metric": "reliability"}, {"below": {**PLAIN, "metric": "reliability", "at": "first"}, "by": 0.2}),
        ({**WITH, "metric": "locality"}, {"above": {**PLAIN, "metric": "locality"}}),
        ({**PLAIN, "metric": "reliability", "when": "uncontradicted"}, {"above": 0.9}),
        ({**PLAIN, "metric": "norm_ratio"}, {"above": {**PLAIN, "metric": "norm_ratio", "at": 1}}),
        ({**PLAIN, "metric": "accuracy", "protocol": "nli@1"}, {"below": 0.5}),
        ({"method": "unedited", "metric": "reliability"}, {"below": {**PLAIN, "metric": "reliability"}}),
        ({"method": "rome", "metric": "reliability"}, {"above": 0.5}),
    ],
)
def test_a_page_answers_as_its_runs_do(of: dict[str, object], bound: dict[str, object], tmp_path: Path) -> None:
    growth, ability = {1: 1.1, 10: 1.9}, {0: 0.5, 1: 0.5, 10: 0.4}
    fake_run(tmp_path / "a", [1] * 10, {1: [1.0], 10: [1.0, 0.5] * 5}, growth=growth, ability=ability)
    fake_run(tmp_path / "b", [1] * 10, {1: [1.0], 10: [0.9] * 10}, policy="simie", locality=0.9)
    runs = collect([tmp_path])
    claim = Claim.model_validate({"says": "so it is", "of": of, **bound})
    [expected] = judged([claim], (), runs, "full")
    [found] = judged([claim], (), shapes.found_in([row for run in runs for row in page_rows.rows_of(run)]), "full")  # type: ignore[arg-type]
    assert (found.where, found.expected, found.verdict) == (expected.where, expected.expected, expected.verdict)
    # The bootstrap interval stands in the runs alone.
    assert found.found.split()[0] == expected.found.split()[0]
    assert (found.verdict == "not measured") == (of["method"] == "rome")


def test_what_an_edit_costs_can_be_claimed(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", [1], {1: [1.0]})
    rows = [row for run in collect([tmp_path]) for row in page_rows.rows_of(run)]
    of = {**PLAIN, "metric": "seconds", "protocol": "cost"}
    [line] = judged([Claim.model_validate({"says": "slow", "of": of, "above": 1.9})], (), shapes.found_in(rows), "full")  # type: ignore[arg-type]
    assert line.verdict == "as expected"
    assert line.found.startswith("2.000")


def test_every_section_is_about_a_page_and_claims_what_can_be_said() -> None:
    sections = read_yaml(shapes.FILE)["sections"]
    assert len(sections) >= 4
    for section in sections:
        assert (SWEEPS / f"{section['page']}.yaml").exists()
        for claim in map(Claim.model_validate, section["claims"]):
            assert claim.of.method in shapes.METHODS.values()
            assert claim.of.policy in shapes.POLICIES.values()
