"""Tables and comparisons over many runs, against rows worked out by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.errors import EvereditError, RunFolderError
from everedit.report.collect import collect, named
from everedit.report.compare import compare
from everedit.report.tables import Entry, latex, markdown, tables, tidy
from tests.support.fake_runs import PROTOCOL, fake_run, fake_sweep

HEADER = "| method | T=1 Rel | T=1 Loc | T=2 Rel | T=2 Loc | T=4 Rel | T=4 Loc |"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of MEMIT, and one run of MEMIT under SimIE with another locality."""
    fake_run(tmp_path / "a0", [1, 1, 1, 0], {1: [1], 2: [1, 0.5], 4: [0, 0, 1, 0]})
    fake_run(tmp_path / "a1", [1, 1, 0, 0], {1: [0], 2: [1, 1], 4: [0, 0, 1, 1]}, seed=1)
    fake_run(tmp_path / "b0", [1, 1, 1, 1], {1: [1], 2: [1, 1], 4: [1, 1, 0.5, 1]}, policy="simie", locality=0.9)
    return tmp_path


def test_a_paper_table_by_hand(runs: Path) -> None:
    lines = markdown(tables(collect([runs]))).splitlines()
    assert lines[0] == (
        f"**tiny, towns, {PROTOCOL}**: of all T edits, with the model after T edits; "
        "mean ± standard deviation over seeds"
    )
    assert lines[2:] == [
        HEADER,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        # Locality of the unedited model is 1, reliability 0.
        "| unedited | 0.000 | 1.000 | 0.000 | 1.000 | 0.000 | 1.000 |",
        # T=1: 1 and 0; T=2: 3/4 and 1; T=4: 1/4 and 2/4. Deviations of two values x and y are |x - y| / sqrt(2).
        "| MEMIT | 0.500 ± 0.707 | 1.000 ± 0.000 | 0.875 ± 0.177 | 1.000 ± 0.000 | 0.375 ± 0.177 | 1.000 ± 0.000 |",
        "| MEMIT + SimIE | 1.000 | 0.900 | 1.000 | 0.900 | 0.875 | 0.900 |",
    ]


def test_when_scores_are_taken(runs: Path) -> None:
    def row(when: Any) -> list[float]:
        [table] = tables(collect([runs]), when)
        entries = dict(table.rows)["MEMIT"]
        return [entries[mark, "reliability"].value for mark in (1, 2, 4)]

    # Right after each edit, seeds 0 and 1: 1, 1, 3/4 and 1, 1, 2/4.
    assert row("immediate") == pytest.approx([1, 1, 0.625])
    # With the last model: [0, 0, 1, 0] and [0, 0, 1, 1], the first T of them.
    assert row("final") == pytest.approx([0, 0, 0.375])
    # Without the first edit, which a later one contradicts: 1/2 and 1 at T=2, 1/3 and 2/3 at T=4.
    assert row("uncontradicted")[1:] == pytest.approx([0.75, 0.5])


def test_what_is_left_of_the_first_hundred(tmp_path: Path) -> None:
    # At 120 edits half of the first hundred are left, and all that came after them.
    later = [1.0, 0.0] * 50 + [1.0] * 20
    fake_run(tmp_path / "run", [1] * 120, {50: [1] * 50, 120: later})
    [table] = tables(collect([tmp_path]), "first_100")
    entries = dict(table.rows)["MEMIT"]
    assert entries[50, "reliability"].value == 1
    assert entries[120, "reliability"].value == 0.5
    low, high = entries[120, "reliability"].low, entries[120, "reliability"].high
    assert low is not None
    assert high is not None
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65


def test_latex_by_hand(runs: Path) -> None:
    lines = latex(tables(collect([runs / "b0"]))).splitlines()
    assert lines == [
        r"\begin{table}",
        rf"\caption{{tiny, towns, {PROTOCOL}: of all T edits, with the model after T edits}}",
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"& \multicolumn{2}{c}{$T=1$} & \multicolumn{2}{c}{$T=2$} & \multicolumn{2}{c}{$T=4$} \\",
        r"\cmidrule(lr){2-3} \cmidrule(lr){4-5} \cmidrule(lr){6-7}",
        r"method & Rel & Loc & Rel & Loc & Rel & Loc \\",
        r"\midrule",
        r"unedited & 0.000 & 1.000 & 0.000 & 1.000 & 0.000 & 1.000 \\",
        r"MEMIT + SimIE & 1.000 & 0.900 & 1.000 & 0.900 & 0.875 & 0.900 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_what_latex_would_read_as_commands_is_escaped(tmp_path: Path) -> None:
    fake_run(tmp_path / "r", [1], {1: [1]}, data=r"a_b & 5% \x {y}^~#$")
    text = latex(tables(collect([tmp_path])))
    assert r"a\_b \& 5\% \textbackslash{}x \{y\}\textasciicircum{}\textasciitilde{}\#\$" in text


def test_tidy_rows_hold_every_number_in_full(runs: Path) -> None:
    rows = tidy(tables(collect([runs])))
    # Three lines, three T, two metrics.
    assert len(rows) == 18
    [row] = [r for r in rows if (r["method"], r["T"], r["metric"]) == ("MEMIT + SimIE", 4, "reliability")]
    theirs = stats.bootstrap(([1, 1, 0.5, 1],), np.mean, method="percentile", n_resamples=9_999, rng=0)
    assert row.pop("low") == pytest.approx(theirs.confidence_interval.low, abs=0.13)
    assert row.pop("high") == theirs.confidence_interval.high == 1.0
    assert row == {
        "model": "tiny", "data": "towns", "protocol": PROTOCOL, "single": False, "method": "MEMIT + SimIE", "T": 4,
        "when": "retained", "metric": "reliability", "value": 0.875, "seeds": 1, "deviation": None,
    }  # fmt: skip
    one = next(r for r in rows if (r["method"], r["T"]) == ("MEMIT + SimIE", 1))
    assert (one["low"], one["high"]) == (None, None)


def summarized(*words: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["summarize", *map(str, words)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_command_writes_every_form(runs: Path) -> None:
    found = json.loads(summarized(runs, "--table", "json"))
    read = list(csv.DictReader(io.StringIO(summarized(runs, "--table", "csv"))))
    assert [row["method"] for row in read] == [row["method"] for row in found]
    assert [float(row["value"]) for row in read] == [row["value"] for row in found]
    assert HEADER in summarized(runs, "--table", "markdown")
    assert r"\toprule" in summarized(runs, "--table", "latex")
    paper = summarized(runs / "b0").splitlines()
    head = next(line for line in paper if "method" in line)
    assert [cell.strip() for cell in head.strip("┃").split("┃")] == ["method", "T=1", "T=2", "T=4"]
    row = next(line for line in paper if "SimIE" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["MEMIT + SimIE", "1.00/.90", "1.00/.90", ".88/.90"]
    tall = summarized(runs / "b0", "--intervals")
    assert "0.90 [0.90, 0.90]" in tall


def test_protocols_and_models_are_never_mixed(runs: Path) -> None:
    fake_run(runs / "c0", [1, 1], {2: [1, 1]}, protocol="other@1")
    fake_run(runs / "d0", [1, 1], {2: [1, 1]}, model="large")
    fake_run(runs / "e0", [1, 1], {2: [1, 1]}, single=True)
    found = tables(collect([runs]))
    assert [(t.model, t.protocol, t.single) for t in found] == [
        ("tiny", PROTOCOL, False), ("tiny", "other@1", False), ("large", PROTOCOL, False), ("tiny", PROTOCOL, True),
    ]  # fmt: skip
    assert "single edits" in found[-1].note
    assert [t.protocol for t in tables(collect([runs]), "retained", ["other@1"])] == ["other@1"]
    result = CliRunner().invoke(app, ["summarize", str(runs), "--protocol", "other"])
    assert result.exit_code == 1
    assert "did you mean other@1" in result.stderr


def test_runs_that_differ_in_settings_are_told_apart(tmp_path: Path) -> None:
    for name, lam, seed in (("a", 1, 0), ("b", 10, 0), ("c", 10, 1)):
        fake_run(tmp_path / name, [1], {1: [1]}, policy="simie", seed=seed, policy_settings={"lam": lam})
    assert {line: len(found) for line, found in named(collect([tmp_path])).items()} == {
        "MEMIT + SimIE (policy.lam=1)": 1,
        "MEMIT + SimIE (policy.lam=10)": 2,
    }


def test_a_sweeps_labels_name_its_lines_and_unfinished_runs_are_marked(tmp_path: Path) -> None:
    fake_run(tmp_path / "s" / "cells" / "x", [1, 0], {1: [1]}, finished=False)
    axes = {"model": "tiny", "data": "towns", "method": "my memit", "policy": "accumulate", "seed": "0"}
    fake_sweep(tmp_path / "s", {"x": {"axes": axes}, "not-yet": {"axes": axes}})
    [table] = tables(collect([tmp_path / "s"]))
    assert [name for name, _ in table.rows] == ["unedited", "my memit (unfinished)"]


def test_general_ability_is_a_table_of_its_own(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", [1, 1], {1: [1], 2: [1, 1]}, ability={0: 0.8, 1: 0.7, 2: 0.4})
    fake_run(tmp_path / "b", [1, 1], {1: [1], 2: [1, 1]}, policy="prune", ability={0: 0.8, 1: 0.75, 2: 0.7})
    lines = markdown(tables(collect([tmp_path]), "retained", ["nli@1"]), interval=True).splitlines()
    assert "general ability, with the model after T edits" in lines[0]
    assert lines[4:] == [
        "| unedited | 0.800 | 0.800 |",
        "| MEMIT | 0.700 [0.600, 0.800] | 0.400 [0.300, 0.500] |",
        "| MEMIT + PRUNE | 0.750 [0.650, 0.850] | 0.700 [0.600, 0.800] |",
    ]
    assert [row.protocol for row in compare(tmp_path / "a", tmp_path / "b").rows] == [PROTOCOL] * 2


def test_of_a_large_number_the_power_of_ten_is_printed() -> None:
    broken = Entry(22585900000000000122347847680.0, low=154.4, high=1e6)
    assert broken.text(3, interval=True) == "2.3e+28 [154.400, 1.0e+06]"
    assert Entry(999999.5).text(1) == "999999.5"
    assert Entry(2e6, seeds=2, deviation=0.5).text(1) == "2.0e+06 ± 0.5"


def test_a_roll_backs_scores_are_a_table_of_their_own(tmp_path: Path) -> None:
    scores = {"ES": 0.9, "GS": 0.5, "LS": None, "ERS": 1.0, "ORS": 0.8, "S": 0.75}
    config = {"model": "tiny", "data": "towns", "method": "wilke", "policy": "accumulate", "seed": 0}
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "rollback.json").write_text(json.dumps({"config": config, "checkpoints": {"8": scores}}))
    lines = markdown(tables(collect([tmp_path]))).splitlines()
    assert lines[2] == "| method | T=8 ES | T=8 GS | T=8 ERS | T=8 ORS | T=8 S |"
    assert lines[4:] == ["| WilKE | 0.900 | 0.500 | 1.000 | 0.800 | 0.750 |"]


def test_folders_without_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run with scores"):
        collect([tmp_path])
    with pytest.raises(RunFolderError, match="nowhere"):
        collect([tmp_path / "nowhere"])
    fake_run(tmp_path / "r", [1], {1: [1]})
    (tmp_path / "r" / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 1"):
        collect([tmp_path])


# --------------------------------------------------------------------------- comparisons


def test_a_comparison_pairs_edits_by_what_they_are(tmp_path: Path) -> None:
    first, second = [1, 0, 0.5, 1, 0, 0], [1, 1, 1, 0.5, 1, 1]
    fake_run(tmp_path / "a", first, {6: first})
    # The same edits but for the first two, and two others at the end.
    shifted = [*second[2:], 0, 0]
    fake_run(tmp_path / "b", shifted, {6: shifted}, policy="simie", first_id=2)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.mark, found.common) == (6, 4)
    assert found.differ == {"policy": ("accumulate", "simie")}
    row = next(row for row in found.rows if row.metric == "reliability")
    ours, theirs = first[2:], second[2:]
    assert (row.test.first, row.test.second) == (np.mean(ours), np.mean(theirs))
    assert (row.test.better, row.test.worse, row.test.same) == (3, 1, 0)

    def gap(a: Any, b: Any, axis: int) -> Any:
        return np.mean(b - a, axis=axis)

    oracle = stats.permutation_test(
        (ours, theirs), gap, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert row.test.p == pytest.approx(oracle.pvalue)
    # Two metrics were compared: Holm doubles the smaller p.
    assert row.adjusted == pytest.approx(min(1.0, 2 * row.test.p))


def test_the_command_shows_a_comparison(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", [1] * 12, {12: [0] * 12})
    fake_run(tmp_path / "b", [1] * 12, {12: [1] * 12}, policy="simie")
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    text = CliRunner(env={"COLUMNS": "100"}).invoke(app, words).stdout
    row = next(line for line in text.splitlines() if "reliability" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "reliability", "0.000", "1.000", "+1.000", "+1.00 +1.00", "12/0/0", "< 0.001*",
    ]  # fmt: skip
    found = json.loads(CliRunner().invoke(app, [*words, "--json", "--score", "immediate"]).stdout)
    assert [row["same"] for row in found["rows"]] == [12, 12]


def test_what_cannot_be_compared_is_one_clear_error(tmp_path: Path) -> None:
    for name, first_id, mark in (("a", 0, 2), ("b", 10, 2), ("c", 0, 3)):
        fake_run(tmp_path / name, [1] * mark, {mark: [1] * mark}, first_id=first_id)
    fake_run(tmp_path / "d", [1, 1], {2: [1, 1]}, protocol="other@1")
    with pytest.raises(EvereditError, match="no edit in common"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(EvereditError, match="no scores after one and the same number"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(EvereditError, match=r"not both runs were scored after 7 edits(?s:.*)scored after: 2"):
        compare(tmp_path / "a", tmp_path / "b", mark=7)
    with pytest.raises(EvereditError, match="share no protocol"):
        compare(tmp_path / "a", tmp_path / "d")
    with pytest.raises(RunFolderError, match="holds 4 runs"):
        compare(tmp_path, tmp_path / "a")
