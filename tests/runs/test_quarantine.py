"""Records that cannot be edited are set aside with their reason and made up for; a plan computes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from everedit import experiments
from everedit.engine import moments, target
from everedit.errors import EditError, NumericalError
from everedit.evaluation import GENERAL
from everedit.experiments.plan import _seconds_per_edit
from everedit.experiments.run import make_editor
from everedit.methods import method_names
from everedit.methods.memit import Memit
from everedit.models import load_model
from tests.support.editing import METHOD_SETTINGS, home_town
from tests.support.editing import make_editor as editor_with
from tests.support.running import MARKS, N_EDITS, records, rows_of, run_config, write_records

pytestmark = pytest.mark.usefixtures("own_cache")


# --------------------------------------------------------------------------- records set aside


def test_bad_records_are_set_aside_and_made_up_for(corpus_path: Path, tmp_path: Path) -> None:
    good = records(4)
    known = home_town(0).model_dump(mode="json", exclude_defaults=True)
    lm = load_model(run_config(tmp_path, corpus_path).model, device="cpu")
    prompt = "Mira Lanner lives in the city of"
    known |= {"prompt": prompt, "target_new": lm.generate([prompt], max_new_tokens=1)[0].strip()}
    bad = {
        "is missing": {"prompt": "The home town of Mira Lanner", "subject": "Mira Lanner"},
        "not valid JSON": '{"prompt": "The home',
        "does not occur": {**good[0], "subject": "Nobody Here"},
        "the same edit as on line 1": good[0],
        "contradicts line 1": {**good[0], "target_new": "Lima"},
        "already the model's answer": known,
        "the edit names none": {**good[0], "prompt": "The home town of nobody", "subject": None},
        "context holds 128": {**good[0], "prompt": "x " * 200 + good[0]["prompt"]},
    }
    file = write_records(tmp_path / "edits.jsonl", [good[0], *bad.values(), *good[1:]])
    out = tmp_path / "run"
    summary = experiments.start(run_config(file, corpus_path, edits=4), out)
    rejected = rows_of(out, "quarantine.jsonl")
    assert summary["quarantined"] == len(rejected) == len(bad)
    found = {item["line"]: item for item in rejected}
    for line, (reason, record) in enumerate(bad.items(), start=2):
        assert reason in found[line]["reason"]
        assert found[line]["fix"]
        assert found[line]["record"] is not None
        if reason == "already the model's answer":
            assert found[line]["record"]["prompt"] == record["prompt"]  # type: ignore[index]
    # All the good ones were edited, in their order: those set aside were made up for.
    edited = [row["prompt"] for row in rows_of(out) if row["kind"] == "edit"]
    assert edited == [record["prompt"] for record in good]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [100, 108, 116, 120, 122, 124, 126, 128])
def test_a_prompt_near_the_end_of_the_context_is_edited_or_set_aside(
    tokens: int, family: str, corpus_path: Path, tmp_path: Path
) -> None:
    config = run_config(tmp_path / "edits.jsonl", corpus_path, family, edits=2)
    lm = load_model(config.model, device="cpu")
    good = records(1)[0]
    long = {"prompt": good["prompt"], "subject": good["subject"], "target_new": good["target_new"]}
    while len(lm.encode(long["prompt"]).ids) < tokens - 1:
        long["prompt"] = f"a {long['prompt']}"
    write_records(tmp_path / "edits.jsonl", [long, good])
    summary = experiments.start(config, tmp_path / "run")
    assert summary["edits"] + summary["quarantined"] == 2
    assert rows_of(tmp_path / "run")[-1]["n"] == summary["edits"] >= 1
    if tokens == 100:
        assert summary["edits"] == 2
    if tokens == 128:
        assert "context" in rows_of(tmp_path / "run", "quarantine.jsonl")[0]["reason"]


@pytest.mark.parametrize("start", ["current", "base"])
@pytest.mark.parametrize("failing", [(1,), (3,), (0, 3)])
def test_an_edit_that_fails_in_the_middle_is_set_aside_and_the_rest_goes_on(
    failing: tuple[int, ...], start: str, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, optimise = records(4), Memit.targets
    bad = {chosen[index]["prompt"] for index in failing}

    def targets(self: Memit, bench: Any, edits: Any) -> Any:
        if any(edit.prompt in bad for edit in edits):
            raise NumericalError(what="the loss is not finite", fix="lower it")
        return optimise(self, bench, edits)

    settings = {"policy_settings": {"start": start}, "checkpoints": (2,)}
    file = write_records(tmp_path / "edits.jsonl", chosen)
    sound = write_records(tmp_path / "sound.jsonl", [record for record in chosen if record["prompt"] not in bad])
    expected = experiments.start(run_config(sound, corpus_path, **settings), tmp_path / "sound")
    monkeypatch.setattr(Memit, "targets", targets)
    found = experiments.start(run_config(file, corpus_path, **settings), tmp_path / "run")
    assert found["quarantined"] == len(failing)
    assert [row["line"] for row in rows_of(tmp_path / "run", "quarantine.jsonl")] == [index + 1 for index in failing]
    assert found["protocols"] == expected["protocols"]
    kinds = [[(row["kind"], row["n"]) for row in rows_of(tmp_path / name)] for name in ("run", "sound")]
    assert kinds[0] == kinds[1]
    # Resumed at its end, the run is what it was.
    assert experiments.resume(tmp_path / "run")["protocols"] == expected["protocols"]


def test_a_run_of_failing_edits_only_is_one_error(
    corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def targets(*_: Any) -> Any:
        raise NumericalError(what="the loss is not finite", fix="lower it")

    monkeypatch.setattr(Memit, "targets", targets)
    file = write_records(tmp_path / "edits.jsonl", records(2))
    with pytest.raises(EditError, match="none of the edits could be made"):
        experiments.start(run_config(file, corpus_path), tmp_path / "run")
    assert len(rows_of(tmp_path / "run", "quarantine.jsonl")) == 2


def test_known_and_contradicting_records_may_be_kept(corpus_path: Path, tmp_path: Path) -> None:
    good = records(1)[0]
    file = write_records(tmp_path / "edits.jsonl", [good, {**good, "target_new": "Lima"}])
    config = run_config(file, corpus_path, contradictions="keep", known="keep")
    assert experiments.start(config, tmp_path / "run")["edits"] == 2
    assert (tmp_path / "run" / "quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize("record", ['{"prompt": "x"}', "no JSON"])
def test_a_file_without_a_single_good_record_is_an_error(record: str, corpus_path: Path, tmp_path: Path) -> None:
    file = write_records(tmp_path / "edits.jsonl", [record])
    with pytest.raises(EditError, match=r"(?s)no edit that can be used.*data validate"):
        experiments.start(run_config(file, corpus_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- plans


def test_a_plan_computes_nothing(corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "cache"))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan computes nothing")

    monkeypatch.setattr(moments, "accumulate", forbidden)
    monkeypatch.setattr(target, "_optimise", forbidden)
    monkeypatch.setattr(Memit, "fit", forbidden)
    data = write_records(tmp_path / "edits.jsonl", records(N_EDITS))
    config = run_config(data, corpus_path)
    plan = experiments.make_plan(config, make_editor(load_model(config.model, device="cpu"), config))
    assert (plan.method, plan.policy, plan.edits, plan.set_aside) == ("memit", "simie", N_EDITS, 0)
    assert plan.layers == plan.statistics_missing == [0, 1]
    assert plan.statistics_tokens == 4096
    assert plan.checkpoints == [*MARKS, N_EDITS]
    assert plan.protocols == list(GENERAL)
    for estimate in (plan.seconds_statistics, plan.seconds_per_edit, plan.seconds_total, plan.memory_mb):
        assert math.isfinite(estimate)
        assert estimate >= 0
    assert plan.seconds_total > 0
    assert plan.memory_mb > 0
    assert not (tmp_path / "cache").exists()
    assert json.loads(json.dumps(plan.as_dict()))["model"]["family"] == "gpt2"


def test_a_plan_knows_which_statistics_are_there(corpus_path: Path, tmp_path: Path) -> None:
    config = run_config(write_records(tmp_path / "edits.jsonl", records(1)), corpus_path)
    editor = make_editor(load_model(config.model, device="cpu"), config)
    editor.prepare()
    plan = experiments.make_plan(config, editor)
    assert (plan.statistics_missing, plan.statistics_tokens, plan.seconds_statistics) == ([], 0, 0.0)


@pytest.mark.parametrize("method", method_names())
def test_a_plan_knows_that_an_edit_of_any_method_takes_time(method: str, corpus_path: Path) -> None:
    edits, rate = [home_town(0), home_town(1)], 1000.0
    editor = editor_with("gpt2", corpus_path, method)
    planned = _seconds_per_edit(editor, edits, rate)
    assert planned > 0
    # Twice the steps, or twice the layers to try, are planned as more time.
    more = dict(METHOD_SETTINGS.get(method, {}))
    if "target" in more:
        more["target"] = {**more["target"], "steps": 2 * more["target"]["steps"]}
    elif steps := getattr(editor.method.config, "steps", None):
        more["steps"] = 2 * steps
    # T-Patcher ends when it is validated, and has more steps only to be on the safe side.
    if more != METHOD_SETTINGS.get(method, {}) and method != "t-patcher":
        longer = editor_with("gpt2", corpus_path, method, method_settings=more)
        assert planned < _seconds_per_edit(longer, edits, rate)
    if method == "wilke":
        wider = {**METHOD_SETTINGS[method], "layers": (0, 1, 2)}
        assert planned < _seconds_per_edit(editor_with("gpt2", corpus_path, method, method_settings=wider), edits, rate)
