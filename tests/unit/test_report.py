"""The report of a run folder: right numbers, safe text, clear errors, and nothing half-written."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from everedit.errors import EvereditError, RunFolderError
from everedit.report import write_report
from everedit.report.figures import PALETTE, norms_figure, scores_figure, seconds_figure, short_name
from everedit.report.results import protocol_results
from everedit.report.run_files import load_run

FORCED = "teacher-forced/token-accuracy@1"
FREE = "free-generation/exact-match@1"
MATRIX = "model.layers.9.mlp.down_proj.weight"

Json = dict[str, Any]


def scores(reliability: float | None, locality: float | None = 1.0) -> Json:
    return {
        "reliability": reliability,
        "generalization": 0.625,
        "locality": locality,
        "portability": None,
    }


def edit_record(n: int, right: float) -> Json:
    return {
        "kind": "edit",
        "n": n,
        "edit_id": f"e{n}",
        "prompt": "The capital of Peru is",
        "subject": "Peru",
        "target_new": "Cusco",
        "ground_truth": None,
        "seconds": {"keys": 0.1, "target": 1.0, "solve": 0.05, "policy": 0.02, "score": 0.4},
        "before": {FORCED: scores(0.0), FREE: scores(0.0)},
        "immediate": {FORCED: scores(0.9), FREE: scores(right)},
    }


def checkpoint_record(n: int, right: float, ratio: float) -> Json:
    retained = {FORCED: scores(0.789, 0.955), FREE: scores(right, 0.5)}
    return {
        "kind": "checkpoint",
        "n": n,
        "retained": retained,
        "norm_ratio": {MATRIX: ratio},
        "peak_memory_mb": 1500.0,
    }


def metrics() -> list[Json]:
    return [
        edit_record(1, 1.0),
        checkpoint_record(1, 1.0, 1.001),
        edit_record(2, 1.0),
        edit_record(3, 0.0),
        edit_record(4, 1.0),
        checkpoint_record(4, 0.5, 1.02),
    ]


def lines(records: list[Json]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def sample(**changes: Any) -> Json:
    record = {
        "edit_id": "e1",
        "n": 1,
        "kind": "rewrite",
        "prompt": "The capital of Peru is",
        "target": "Cusco",
        "base_text": " Lima, a large city",
        "edited_text": " Cusco, a large city",
    }
    return record | changes


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "model": {"name": "tiny", "family": "llama", "parameters": 134515008, "fingerprint": "f00dcafe"},
        "method": "memit",
        "policy": "simie",
        "data": {"name": "worldfacts", "path": "worldfacts.jsonl", "sha256": "5ha256"},
        "edits": 4,
        "checkpoints": [1, 4],
        "settings": {"method": {"layers": [4, 5]}, "policy": {"ridge": 0.001}},
        "protocols": [FORCED, FREE],
        "versions": {"everedit": "0.1.0", "torch": "2.99.1"},
        "command": "everedit run --method memit --policy 'simie'",
        "created": "2025-05-01T10:00:00+00:00",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(lines(metrics()), encoding="utf-8")
    (folder / "samples.jsonl").write_text(lines([sample()]), encoding="utf-8")
    checkpoints = {
        "1": {"retained": scores(1.0)},
        "4": {"immediate": scores(0.75), "retained": scores(0.5, 0.5)},
    }
    summary = {
        "protocols": {
            FORCED: {"unedited": scores(0.031), "checkpoints": {"4": {"retained": scores(0.789, 0.955)}}},
            FREE: {"unedited": scores(0.0), "checkpoints": checkpoints},
        },
        "edits": 4,
        "quarantined": 2,
        "seconds_per_edit": {"keys": 0.1, "target": 1.0, "solve": 0.05, "score": 0.4, "total": 1.55},
        "peak_memory_mb": 1600.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


class Tables(HTMLParser):
    """Collects every table as rows of cell texts, and every attribute of every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def heading(page: str) -> str:
    match = re.search(r"<h1>(.*?)</h1>", page)
    assert match
    return match[1]


def test_writes_report_html_into_the_run_folder(run_dir: Path) -> None:
    before = sorted(path.name for path in run_dir.iterdir())
    assert write_report(run_dir) == run_dir / "report.html"
    assert sorted(path.name for path in run_dir.iterdir()) == sorted([*before, "report.html"])


def test_first_table_holds_the_first_protocols_numbers(run_dir: Path) -> None:
    table = Tables(page_of(run_dir)).tables[0]
    assert table == [
        ["Share right", "reliability", "generalization", "locality", "portability"],
        ["Unedited model", "3.1%", "62.5%", "100.0%", "–"],
        ["Right after each edit", "90.0%", "62.5%", "100.0%", "–"],
        ["Retained after 4 edits", "78.9%", "62.5%", "95.5%", "–"],
    ]


def test_every_protocol_has_a_table_and_an_explanation(run_dir: Path) -> None:
    page = page_of(run_dir)
    free = next(t for t in Tables(page).tables[1:] if t[1][0] == "Unedited model")
    assert free[2][1:4] == ["75.0%", "62.5%", "100.0%"]
    assert free[3][1:4] == ["50.0%", "62.5%", "50.0%"]
    assert "The right answer is fed to the model token by token" in page
    assert "The model writes its own answer" in page


def test_null_score_is_a_dash_that_says_what_it_means(run_dir: Path) -> None:
    assert 'aria-label="not measured"' in page_of(run_dir)


def test_headline_counts_answers_under_the_strictest_protocol(run_dir: Path) -> None:
    page = page_of(run_dir)
    expected = "After 4 edits the model still writes 2 of the 4 new answers; right after each edit it was 3."
    assert heading(page) == expected
    assert "50.0% on unrelated questions (100.0% before editing)" in page


def test_single_edits_are_not_said_to_be_retained(run_dir: Path) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "run": {"single": True}}))
    page = page_of(run_dir)
    assert heading(page) == "Of 4 edits, each made by itself, the model writes 3 of the 4 new answers."
    assert [row[0] for row in Tables(page).tables[0][1:]] == [
        "Unedited model", "Each edit by itself, taken back before the next",
    ]  # fmt: skip
    assert "etained" not in page.partition("<main>")[2]


def test_headline_uses_a_percentage_where_a_count_would_be_a_guess(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["protocols"][FREE]["checkpoints"]["4"]["retained"]["reliability"] = 0.6
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert "still writes 60.0% of the new answers" in heading(page_of(run_dir))


def test_headline_of_token_accuracy_never_counts_answers(run_dir: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        text = (run_dir / name).read_text().replace(FREE, "other/protocol@1").replace("0.789", "0.75")
        (run_dir / name).write_text(text)
    assert "still ranks first 75.0% of the tokens of the new answers" in heading(page_of(run_dir))


def test_generated_text_is_escaped(run_dir: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    records = [sample(prompt=evil, target=evil, base_text=evil, edited_text="x " + evil, edit_id=evil)]
    (run_dir / "samples.jsonl").write_text(lines(records))
    (run_dir / "quarantine.jsonl").write_text(
        lines([{"line": 12, "reason": evil, "fix": evil, "record": {"prompt": evil}}])
    )
    changed = metrics()
    changed[-1]["norm_ratio"] = {f"</desc>{evil}": 1.1}
    (run_dir / "metrics.jsonl").write_text(lines(changed))
    config = json.loads((run_dir / "config.json").read_text()) | {"command": evil, evil: evil}
    (run_dir / "config.json").write_text(json.dumps(config))
    page = page_of(run_dir)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<desc") == page.count("</desc>") == 3


def test_target_is_marked_where_it_occurs(run_dir: Path) -> None:
    records = [
        sample(edited_text=" It is CUSCO, near Cuscotopia"),
        sample(target="東京", base_text="京都", edited_text="首都は東京です"),
        sample(target="", base_text="anything", edited_text=""),
    ]
    (run_dir / "samples.jsonl").write_text(lines(records))
    page = page_of(run_dir)
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["CUSCO", "東京"]
    assert page.count("contains the expected answer") == 2
    assert "(no text)" in page


def test_odd_text_survives(run_dir: Path) -> None:
    text = "line one\nline two \u2028 \x00 🙂 سيدني"
    (run_dir / "samples.jsonl").write_text(
        lines([sample(edited_text=text)]) + json.dumps(sample(edited_text="half \ud83d pair")) + "\n"
    )
    page = page_of(run_dir)
    assert "line one\nline two \u2028 ␀ 🙂 سيدني" in page
    assert "half ? pair" in page


def test_long_runs_show_some_samples_and_say_so(run_dir: Path) -> None:
    (run_dir / "samples.jsonl").write_text(lines([sample(n=n, prompt=f"Prompt {n}.") for n in range(1, 301)]))
    page = page_of(run_dir)
    assert "(60 of 300, evenly chosen; all are in samples.jsonl)" in page
    assert len(re.findall(r"Prompt \d+\.", page)) == 60
    assert "Prompt 1." in page
    assert "Prompt 296." in page


def test_quarantined_records_are_listed(run_dir: Path) -> None:
    record = {"line": 12, "reason": "no subject", "fix": "add it", "record": {"prompt": "p"}}
    (run_dir / "quarantine.jsonl").write_text(lines([record]))
    tables = Tables(page_of(run_dir)).tables
    assert ["12", "no subject", "add it", '{"prompt": "p"}'] in [row for table in tables for row in table]


def test_provenance_names_command_settings_hashes_and_versions(run_dir: Path) -> None:
    page = page_of(run_dir)
    rows = [row for table in Tables(page).tables for row in table]
    assert ["settings.policy.ridge", "0.001"] in rows
    assert ["settings.method.layers", "4, 5"] in rows
    assert ["model.fingerprint", "f00dcafe"] in rows
    assert ["data.sha256", "5ha256"] in rows
    assert ["torch", "2.99.1"] in rows
    assert "everedit run --method memit --policy &#39;simie&#39;" in page


def test_finished_run_has_no_note(run_dir: Path) -> None:
    assert "not finished" not in page_of(run_dir)


def test_run_without_summary_is_rendered_from_its_records(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    page = page_of(run_dir)
    assert "This run is not finished." in page
    assert "4 of 4 edits are on record (it has no summary yet)" in page
    assert heading(page).startswith("After 4 edits the model still writes 2 of the 4 new answers")
    assert Tables(page).tables[0][1:] == [
        ["Unedited model", "0.0%", "62.5%", "100.0%", "–"],
        ["Right after each edit", "90.0%", "62.5%", "100.0%", "–"],
        ["Retained after 4 edits", "78.9%", "62.5%", "95.5%", "–"],
    ]


def test_truncated_last_line_is_dropped_with_a_note(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    path = run_dir / "metrics.jsonl"
    path.write_bytes(lines(metrics()).encode()[:-40])
    page = page_of(run_dir)
    assert "the last line of metrics.jsonl is cut off" in page
    # The checkpoint after edit 4 is the line that was lost: the table goes back to the one before it.
    assert heading(page) == ("After 1 edit the model still writes 1 of 1 new answer; right after each edit it was 1.")
    assert Tables(page).tables[0][2][0] == "Right after each edit up to edit 1"


def test_run_cut_before_its_first_checkpoint(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    (run_dir / "samples.jsonl").unlink()
    (run_dir / "metrics.jsonl").write_text(lines(metrics()[:1]))
    page = page_of(run_dir)
    assert heading(page).startswith("After 1 edit no checkpoint has been reached yet")
    assert Tables(page).tables[0][3] == ["Retained", "–", "–", "–", "–"]


def test_run_folder_with_only_a_config(run_dir: Path) -> None:
    for name in ("summary.json", "samples.jsonl", "metrics.jsonl"):
        (run_dir / name).unlink()
    page = page_of(run_dir)
    assert heading(page) == "No edit of this run has been measured yet."
    assert "This run is not finished." in page
    assert "<svg" not in page


def test_repeated_edit_of_a_resumed_run_counts_once(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    (run_dir / "metrics.jsonl").write_text(lines([edit_record(1, 0.0), *metrics()]))
    free = protocol_results(load_run(run_dir))[1]
    assert free.running["reliability"] == [(1, 1.0), (2, 1.0), (3, pytest.approx(2 / 3)), (4, 0.75)]
    assert free.measured == {1: 1, 4: 4}


def test_missing_config_is_an_error_with_a_fix(run_dir: Path) -> None:
    (run_dir / "config.json").unlink()
    with pytest.raises(RunFolderError, match=r"no config\.json") as caught:
        write_report(run_dir)
    assert caught.value.where == str(run_dir / "config.json")
    assert caught.value.fix


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("bad", ["{not json}", "[1, 2]", '{"kind": "edit", "n": null}', "\udcff"])
def test_malformed_middle_line_is_named(run_dir: Path, bad: str) -> None:
    good = lines(metrics()).splitlines()
    good.insert(2, bad)
    (run_dir / "metrics.jsonl").write_text("\n".join(good) + "\n", errors="surrogateescape")
    with pytest.raises(RunFolderError) as caught:
        write_report(run_dir)
    assert caught.value.where == f"{run_dir / 'metrics.jsonl'}, line 3"


def test_malformed_config_is_named_with_its_line(run_dir: Path) -> None:
    (run_dir / "config.json").write_text('{"edits": 4,\n oops}')
    with pytest.raises(RunFolderError) as caught:
        write_report(run_dir)
    assert caught.value.where == f"{run_dir / 'config.json'}, line 2"


def test_old_report_stays_when_rendering_fails(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "report.html").write_text("old")

    def fail(*_: object) -> str:
        raise RuntimeError("broken figure")

    monkeypatch.setattr("everedit.report.figures.seconds_figure", fail)
    with pytest.raises(RuntimeError, match="broken figure"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "old"


def test_old_report_stays_when_the_disk_fails(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "report.html").write_text("old")
    before = sorted(run_dir.iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunFolderError, match="No space left"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "old"
    assert sorted(run_dir.iterdir()) == before


def test_missing_extra_is_explained(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(EvereditError, match=r"everedit\[report\]"):
        write_report(run_dir)


def test_page_needs_no_network_and_no_script(run_dir: Path) -> None:
    page = page_of(run_dir)
    links = [value for _, name, value in Tables(page).attributes if name in ("src", "href", "srcset", "data")]
    assert links, "the figures refer to their own glyphs"
    assert all(link.startswith("#") for link in links)
    assert "http" not in page
    assert "<script" not in page
    assert "@import" not in page


def test_page_is_accessible_and_ids_are_unique(run_dir: Path) -> None:
    page = page_of(run_dir)
    attributes = Tables(page).attributes
    assert ("html", "lang", "en") in attributes
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value[1:] for _, name, value in attributes if name == "href"]
    used += re.findall(r"url\(#([^)]*)\)", page)
    for _, name, value in attributes:
        if name == "aria-labelledby":
            used += value.split()
    assert set(used) <= set(ids)
    assert page.count("<svg") == page.count("<title id=") == 3


def test_page_is_the_same_each_time(run_dir: Path) -> None:
    assert page_of(run_dir) == page_of(run_dir)


def test_figures_use_the_pages_colours_and_change_no_global_setting() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg = scores_figure({"reliability": [(1, 1.0), (2, 0.5)]}, {"reliability": [(2, 0.5)]}, "a < b")
    assert dict(matplotlib.rcParams) == before
    assert f"var(--blue, {PALETTE['blue']})" in svg
    assert '<desc id="fig-scores-desc">a &lt; b</desc>' in svg
    assert svg.startswith("<svg viewBox=")
    assert svg.endswith("</svg>")
    css = (Path(sys.modules["everedit.report"].__file__ or "").parent / "templates" / "run.css").read_text()
    for name, value in PALETTE.items():
        assert f"--{name}: {value};" in css


def test_figures_without_data_are_left_out() -> None:
    assert scores_figure({"reliability": []}, {}, "") == ""
    assert seconds_figure([], {}, "") == ""
    assert seconds_figure([1], {"keys": [0.0]}, "") == ""
    assert norms_figure({}, "") == ""


def test_long_runs_keep_figures_small() -> None:
    numbers = list(range(1, 5001))
    assert len(seconds_figure(numbers, {"keys": [0.1 + n % 7 for n in numbers]}, "")) < 60_000
    svg = norms_figure({f"model.layers.{i}.mlp.down_proj.weight": [(1, 1 + i / 100)] for i in range(30)}, "")
    assert f"var(--grey, {PALETTE['grey']})" in svg


def test_matrix_names_are_shortened() -> None:
    assert short_name(MATRIX) == "layer 9 mlp.down_proj"
    assert short_name("lm_head") == "lm_head"


def test_report_imports_only_its_own_modules_and_what_knows_no_model() -> None:
    folder = Path(sys.modules["everedit.report"].__file__ or "").parent
    imported: set[str] = set()
    for source in folder.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    own = {name for name in imported if name.startswith("everedit") and "everedit.report" not in name}
    assert own == {"everedit.errors", "everedit.cache", "everedit.uncertainty"}
    assert not {name.split(".")[0] for name in imported} & {"torch", "transformers"}
    assert not {"matplotlib.pyplot", "pylab"} & imported
