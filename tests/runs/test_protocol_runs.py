"""Runs under the papers' protocols: contradicted records, general ability, reports, resuming, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everedit import experiments
from everedit.errors import EditError, EvereditError, UnknownName
from everedit.evaluation import PROTOCOLS, Baseline
from everedit.experiments import RunConfig
from everedit.report import write_report
from tests.support import facts
from tests.support.editing import home_town
from tests.support.running import Interrupting, rows_of, run_config, same_results, without_times, write_records

pytestmark = pytest.mark.usefixtures("own_cache")

ROME, LIFELONG, BIOGRAPHY, WILD = "rome/counterfact@1", "wise/lifelong@1", "wise/hallucination@1", "wild/question@1"


def counterfact(person: int, target: str, prompt: str = "The home town of {}") -> dict[str, Any]:
    """A record in EasyEdit's reduced form, about a fact of the tiny models."""
    fact, neighbour = facts.facts()[3 * person], facts.facts()[3 * (person + 20)]
    return {
        "id": f"r{person}{target}",
        "prompt": prompt.format(fact.subject),
        "target_new": target,
        "subject": fact.subject,
        "ground_truth": fact.answer,
        "rephrase_prompt": f"Yes. {prompt.format(fact.subject)}",
        "locality_prompt": neighbour.prompt,
        "locality_ground_truth": neighbour.answer,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [
        counterfact(0, "Lima"),
        counterfact(1, "Oslo"),
        counterfact(0, "Kyoto", "In short: The home town of {}"),  # the first record's question in other words
        counterfact(2, "Toronto"),
    ]
    return write_records(tmp_path_factory.mktemp("data") / "cf.jsonl", records)


@pytest.fixture(scope="module")
def abilities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ability")
    (folder / "me_ppl.jsonl").write_text("".join(f'{{"text": "{s}"}}\n' for s in facts.sentences()[:6]))
    rows = []
    for fact in facts.facts()[:8]:
        wrong = [answer for answer in facts.ANSWERS[fact.relation] if answer != fact.answer]
        rows.append({"article": fact.prompt, "options": [*wrong[:3], fact.answer], "answers": "D"})
    (folder / "dialogue.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def of_set(data: Path, corpus: Path, name: str, **changes: Any) -> RunConfig:
    """The config of a small run over a file in the form of a data set."""
    method = changes.get("method", "rome")
    made = run_config(data, corpus, method=method, policy="accumulate")
    return RunConfig.model_validate({**made.model_dump(), "data": name, "data_path": data, **changes})


def config(data: Path, corpus: Path, abilities: Path, **changes: Any) -> RunConfig:
    ability = {"tasks": ("dialogue", "me-ppl"), "path": abilities}
    given = {"edits": 4, "checkpoints": (2,), "protocols": (ROME, LIFELONG, WILD), "ability": ability}
    return of_set(data, corpus, "counterfact", **{**given, **changes})


@pytest.fixture(scope="module")
def whole(
    data: Path, corpus_path: Path, abilities: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path, dict[str, Any]]:
    settings, out = config(data, corpus_path, abilities), tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EVEREDIT_CACHE", str(out.parent / "cache"))
        return settings, out, experiments.start(settings, out)


def test_each_protocol_has_its_own_figures(whole: tuple[RunConfig, Path, dict[str, Any]]) -> None:
    _, out, summary = whole
    assert list(summary["protocols"]) == [ROME, LIFELONG, WILD]
    for name, scores in summary["protocols"].items():
        assert list(scores["unedited"]) == list(PROTOCOLS[name].columns)
        for mark, parts in scores["checkpoints"].items():
            assert all(list(part) == list(PROTOCOLS[name].columns) for part in parts.values())
            for metric, interval in scores["intervals"][mark].items():
                value = parts["retained"][metric]
                assert (interval is None) == (value is None)
                assert interval is None or interval[0] <= value <= interval[1] or metric == "S"
    rome = summary["protocols"][ROME]
    assert rome["unedited"]["ES"] < rome["checkpoints"]["4"]["immediate"]["ES"] == 1.0
    assert summary["protocols"][LIFELONG]["unedited"]["locality"] == 1.0
    # What was said is kept as it was, token by token.
    raw = Baseline.from_json(json.loads((out / "answers.json").read_text())).answers
    assert raw.open
    assert all(reading.target and len(reading.predicted) == len(reading.target) for reading in raw.readings.values())


def test_scores_are_also_given_without_what_a_later_record_contradicts(
    whole: tuple[RunConfig, Path, dict[str, Any]],
) -> None:
    _, out, summary = whole
    assert summary["contradicted"] == {"2": 0, "4": 1}
    [_, last] = [row for row in rows_of(out) if row["kind"] == "checkpoint"]
    by_edit = last["by_edit"][LIFELONG]["reliability"]
    parts = summary["protocols"][LIFELONG]["checkpoints"]["4"]
    assert parts["retained"]["reliability"] == pytest.approx(sum(by_edit) / 4)
    assert parts["uncontradicted"]["reliability"] == pytest.approx(sum(by_edit[1:]) / 3)
    assert parts["uncontradicted"]["reliability"] > parts["retained"]["reliability"]
    assert parts["first_100"] == parts["retained"]
    early = summary["protocols"][LIFELONG]["checkpoints"]["2"]
    assert early["uncontradicted"] == early["retained"]


def test_general_ability_is_measured_before_the_first_edit_and_at_checkpoints(
    whole: tuple[RunConfig, Path, dict[str, Any]],
) -> None:
    _, out, summary = whole
    found = summary["ability"]
    assert found["unedited"] == json.loads((out / "ability.json").read_text())
    assert found["checkpoints"].keys() == {"2", "4"}
    assert found["unedited"].keys() == found["checkpoints"]["4"].keys() == {"dialogue@1", "me-ppl@1"}
    assert found["unedited"]["dialogue@1"]["figures"]["accuracy"] == 1.0
    parts = (found["unedited"], found["checkpoints"]["4"])
    before, after = (part["me-ppl@1"]["figures"]["perplexity"] for part in parts)
    assert after != before


def test_the_report_shows_any_protocol(whole: tuple[RunConfig, Path, dict[str, Any]]) -> None:
    page = write_report(whole[1]).read_text(encoding="utf-8")
    for text in (ROME, ">ES<", ">S<", "average", "without 1 that a later edit contradicts", "harmonic mean"):
        assert text in page, text


def test_a_run_under_one_odd_protocol_has_a_headline(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in data.read_text().splitlines()]
    file = write_records(tmp_path / "h.jsonl", records)
    settings = of_set(file, corpus_path, "hallucination", method="ft", edits=2, checkpoints=(), protocols=(BIOGRAPHY,))
    summary = experiments.start(settings, tmp_path / "run")
    scores = summary["protocols"][BIOGRAPHY]
    assert scores["unedited"]["perplexity"] > scores["checkpoints"]["2"]["retained"]["perplexity"] >= 1.0
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "After 2 edits perplexity is" in page


def test_an_interrupted_run_ends_with_the_same_figures(
    whole: tuple[RunConfig, Path, dict[str, Any]], tmp_path: Path
) -> None:
    settings, out, summary = whole
    with pytest.raises(KeyboardInterrupt):
        experiments.start(settings, tmp_path / "cut", reporter=Interrupting(3))
    assert without_times(experiments.resume(tmp_path / "cut")) == without_times(json.loads(json.dumps(summary)))
    same_results(tmp_path / "cut", out)
    assert (tmp_path / "cut" / "answers.json").read_bytes() == (out / "answers.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"protocols": (BIOGRAPHY,)}, EditError, "'counterfact' is not scored under wise/hallucination@1"),
        ({"protocols": ("rome/counterfact@7",)}, EditError, "not scored under"),
        ({"data": "plain", "protocols": ("rome/conterfact@1",)}, UnknownName, "did you mean rome/counterfact@1"),
        ({"data": "plain", "protocols": ("wild/judged@1",)}, EditError, "needs a judge"),
        ({"data": "plain", "protocols": ("wild/chat@1",)}, EvereditError, "no chat form"),
        ({"references": "none.json"}, EditError, "reference texts"),
        ({"ability": {"tasks": ["piqua"]}}, UnknownName, "did you mean piqa@1"),
        ({"ability": {"tasks": ["nli"], "path": "."}}, EditError, "is not there"),
    ],
)
def test_bad_choices_are_errors_before_the_first_edit(
    changes: dict[str, Any], kind: type[Exception], message: str, corpus_path: Path, tmp_path: Path
) -> None:
    records = [home_town(person).model_dump(mode="json", exclude_defaults=True) for person in range(2)]
    file = write_records(tmp_path / "own.jsonl", records)
    settings = RunConfig.model_validate({**of_set(file, corpus_path, "counterfact").model_dump(), **changes})
    with pytest.raises(kind, match=message):
        experiments.start(settings, tmp_path / "out")
    assert not (tmp_path / "out" / "edits.jsonl").exists()
