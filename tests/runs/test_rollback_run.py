"""``everedit rollback`` and what it leaves: facts that the model knows, edited and edited back, and scored."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import pytest
from click.testing import Result
from typer.testing import CliRunner

from everedit import experiments
from everedit.cli.main import app
from everedit.edit import Edit
from everedit.editor import Editor, EditResult
from everedit.errors import EditError, RunFolderError
from everedit.experiments import RunConfig, rollback_run
from everedit.experiments.rollback import rollback
from everedit.experiments.run import make_editor
from tests.support import facts, tiny
from tests.support.editing import METHOD_SETTINGS, home_town
from tests.support.loading import edit_of, shared
from tests.support.running import full_edit, run_config, write_records

pytestmark = pytest.mark.usefixtures("own_cache")
SCORES = ["ES", "GS", "LS", "ERS", "ORS", "S"]
UNTOUCHED = 4


def town(person: int) -> Edit:
    """A fact that the model knows and that can be edited: a home town "is", behind the name."""
    return full_edit(person).model_copy(update={"ground_truth": "is"})


def told(person: int, truth: str | None = None) -> Edit:
    """A fact of the table, whose true answer the model knows, or one with another ``truth``, which it does not."""
    fact = facts.facts()[3 * person]
    return edit_of(fact, "Nowhere" if truth else None, ground_truth=truth or fact.answer)


def wrong(person: int) -> Edit:
    return told(person, facts.counterfactual(facts.facts()[3 * person]))


EDITED = [town(0), town(3), town(5)]
ASKED = [told(20), told(22), told(23), told(24)]
TABLE = [
    town(0),
    full_edit(1),  # the city itself is said only behind "is"
    home_town(2),  # no true answer
    town(3),
    town(4).model_copy(update={"subject": None}),  # neither ROME nor WilKE can edit it
    town(5),
    told(20),
    wrong(21),
    told(22),
    told(23),
    told(24),
    town(6),  # known, and not needed
]  # fmt: skip


def file_of(path: Path, edits: list[Edit]) -> Path:
    return write_records(path, [edit.model_dump(mode="json", exclude_defaults=True) for edit in edits])


def everedit(*words: object, code: int = 0) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def fails(*words: object) -> str:
    """Run a command that must fail with exit code 1 and one error, and return its message, as one line."""
    result = everedit(*words, code=1)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == result.stderr.count("what to do:") == 1
    return " ".join(result.stderr.split())


def words_of(data: Path, corpus: Path, out: Path, method: str = "rome", **flags: object) -> list[object]:
    """The command for :func:`config_of`."""
    given: dict[str, object] = {
        "model": tiny.trained("gpt2"), "device": "cpu", "method": method, "data": data, "out": out,
        "edits": len(EDITED), "untouched": UNTOUCHED, "checkpoints": "1,2,9", **flags,
    }  # fmt: skip
    settings = {f"method.{key}": value for key, value in METHOD_SETTINGS[method].items()}
    settings |= {"stats.corpus": str(corpus), "stats.tokens": 4096, "stats.window_tokens": 64}
    words: list[object] = ["rollback"]
    words += [word for key, value in given.items() for word in (f"--{key}", value)]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def config_of(data: Path, corpus: Path, method: str = "rome", **changes: Any) -> RunConfig:
    given = {"policy": "accumulate", "edits": len(EDITED), "checkpoints": (1, 2), **changes}
    return run_config(data, corpus, method=method, **given)


def saved(out: Path) -> Any:
    return json.loads((out / "rollback.json").read_text(encoding="utf-8"))


def no_edit(self: Editor, *edits: Any, **options: Any) -> NoReturn:
    pytest.fail("an edit was made")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_of(tmp_path_factory.mktemp("data") / "facts.jsonl", TABLE)


class Done:
    """A finished command: its method, its config, what it printed and what it left."""

    def __init__(self, method: str, data: Path, corpus: Path, out: Path) -> None:
        self.method, self.out, self.config = method, out, config_of(data, corpus, method)
        self.printed = json.loads(everedit(*words_of(data, corpus, out, method), "--json").stdout)
        self.result = saved(out)


@pytest.fixture(scope="module", params=["rome", "wilke"])
def done(
    request: pytest.FixtureRequest,
    data: Path,
    corpus_path: Path,
    session_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVEREDIT_CACHE", str(session_cache))
        return Done(request.param, data, corpus_path, tmp_path_factory.mktemp("runs") / request.param)


# --------------------------------------------------------------------------- what it leaves


def test_the_file_holds_the_config_and_every_number_and_is_what_is_printed(done: Done) -> None:
    assert list(done.result) == ["config", "facts", "checkpoints", "sizes", "flashes", "buildup"]
    assert done.result["config"] == done.config.model_dump(mode="json")
    assert done.result["config"]["method"] == done.method
    assert done.printed.pop("out") == str(done.out)
    assert done.printed == done.result
    assert [path.name for path in done.out.iterdir()] == ["rollback.json"]


def test_the_facts_are_the_first_that_the_model_knows_and_the_method_can_edit(done: Done) -> None:
    assert done.result["facts"] == {
        "edited": [edit.id for edit in EDITED],
        "untouched": [edit.id for edit in ASKED],
    }
    by_id = {edit.id: edit for edit in TABLE}
    chosen = [*done.result["facts"]["edited"], *done.result["facts"]["untouched"]]
    assert len(set(chosen)) == len(EDITED) + UNTOUCHED
    # Read again by greedy decoding, in a model that nobody has edited.
    lm = shared("gpt2")
    for edit in (by_id[name] for name in chosen):
        prompt, whole = (
            lm.tokenizer(text)["input_ids"] for text in (edit.prompt, f"{edit.prompt} {edit.ground_truth}")
        )
        answer = whole[len(prompt) :]
        assert lm.generate_ids([prompt], max_new_tokens=len(answer))[0] == answer


def test_there_is_a_row_of_scores_at_each_mark_and_at_the_end(done: Done) -> None:
    rows = done.result["checkpoints"]
    assert list(rows) == ["1", "2", "3"]
    for mark, row in rows.items():
        assert list(row) == SCORES
        # Shares of so many facts, probes and untouched facts.
        for name, parts in (("ES", 1), ("GS", 1), ("LS", 2), ("ERS", 1)):
            assert 0 <= row[name] <= 1
            assert row[name] * parts * int(mark) == pytest.approx(round(row[name] * parts * int(mark)))
        assert row["ORS"] * UNTOUCHED in range(UNTOUCHED + 1)
        parts_of_s = [max(row[name], 1e-4) for name in SCORES[:-1]]
        assert row["S"] == pytest.approx(len(parts_of_s) / sum(1 / part for part in parts_of_s))
    # The edits take, and are taken back; to say so of none would make a perfect score of nothing.
    assert rows["3"]["ES"] == 1.0
    assert rows["3"]["ERS"] > 0


def test_there_are_two_updates_for_each_fact_and_their_toxicity(done: Done) -> None:
    sizes = done.result["sizes"]
    assert len(sizes) == 2 * len(EDITED)
    assert all(size > 0 and math.isfinite(size) for size in sizes)
    # A tenth of six updates is one.
    assert done.result["buildup"] == pytest.approx(sizes[-1] / sizes[0])
    assert done.result["flashes"] == [n + 1 for n in range(1, 6) if sizes[n] > 10 * median(sizes[:n])]


def test_the_numbers_are_those_of_the_protocol_on_these_facts(done: Done) -> None:
    """The same again by hand: an editor of the config's, the facts, and the protocol."""
    editor = make_editor(shared("gpt2"), done.config)
    try:
        found = rollback(editor, EDITED, ASKED, [1, 2])
    finally:
        editor.reset()
    assert found == {key: done.result[key] for key in ("checkpoints", "sizes", "flashes", "buildup")}


def test_the_same_seed_gives_the_same_result_and_another_one_does_not(
    data: Path, corpus_path: Path, tmp_path: Path
) -> None:
    words = [str(word) for word in words_of(data, corpus_path, tmp_path / "one", seed=7)]
    child = subprocess.run(
        [sys.executable, "-m", "everedit", *words, "--json"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert "Traceback" not in child.stderr
    one = json.loads(child.stdout)
    assert one.pop("out") == str(tmp_path / "one")
    assert one == saved(tmp_path / "one")
    assert rollback_run(config_of(data, corpus_path, seed=7), UNTOUCHED, tmp_path / "two") == one
    assert saved(tmp_path / "two") == one
    other = rollback_run(config_of(data, corpus_path, seed=8), UNTOUCHED, tmp_path / "other")
    assert other["facts"] == one["facts"]
    assert other["sizes"] != one["sizes"]


def test_wilke_goes_back_at_the_layer_of_the_way_there(
    data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos: list[dict[str, Any]] = []
    make = Editor.edit

    def noting(self: Editor, edit: Any, *, score: bool = True) -> EditResult:
        result = make(self, edit, score=score)
        infos.extend(commit.patch.info for commit in result.commits)
        return result

    monkeypatch.setattr(Editor, "edit", noting)
    words = words_of(data, corpus_path, tmp_path / "out", "wilke", edits=2, untouched=0)
    everedit(*words, "--set", "method.layers=[1,2,3]")
    assert [set(info["scores"]) for info in infos[::2]] == [{"1", "2", "3"}] * 2
    assert [(info["layer"], set(info["scores"])) for info in infos[1::2]] == [
        (info["layer"], {str(info["layer"])}) for info in infos[::2]
    ]


# --------------------------------------------------------------------------- what it shows


def test_the_table_is_shown_without_json(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    text = everedit(*words_of(data, corpus_path, out, edits=1, untouched=0)).stdout
    found = saved(out)
    assert found["facts"] == {"edited": [EDITED[0].id], "untouched": []}
    [row] = found["checkpoints"].values()
    assert row["ORS"] is None
    with pytest.raises(ValueError):
        json.loads(text)
    assert all(name in text for name in SCORES)
    [line] = [line for line in text.splitlines() if "after 1" in line]
    shown = ["–" if row[name] is None else f"{row[name]:.3f}" for name in SCORES]
    assert line.replace("│", " ").split() == ["after", "1", *shown]
    assert f"buildup {found['buildup']:.2f}" in text
    assert str(out / "rollback.json") in text


class Canned:
    """Stands for the run and keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flashes: list[int]) -> None:
        row = dict(zip(SCORES, (1.0, None, 0.25, 0.5, 0.125, 0.3), strict=True))
        self.result = {"checkpoints": {"1": row, "20": row}, "sizes": [1.0], "flashes": flashes, "buildup": 2.345}
        monkeypatch.setattr(experiments, "rollback_run", self.run)

    def run(self, config: RunConfig, untouched: int, out: Path, reporter: Any = None) -> dict[str, Any]:
        self.config, self.untouched, self.out = config, untouched, out
        return self.result


@pytest.mark.parametrize(
    ("flashes", "said"), [([], "flashes at updates none, buildup 2.3"), ([3, 12], "flashes at updates 3, 12, buildup")]
)
def test_flashes_and_every_checkpoint_are_shown(flashes: list[int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Canned(monkeypatch, flashes)
    text = everedit("rollback", "--method", "rome").stdout
    assert said in text
    assert "rome" in text
    lines = [line.replace("│", " ").split() for line in text.splitlines() if "after" in line]
    shown = ["1.000", "–", "0.250", "0.500", "0.125", "0.300"]
    assert lines == [["after", "1", *shown], ["after", "20", *shown]]


def test_what_is_not_said_is_as_the_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    canned = Canned(monkeypatch, [])
    everedit("rollback")
    config = canned.config
    assert (config.model, config.method, config.policy) == ("smollm2-135m", "wilke", "accumulate")
    assert (config.data, config.edits, config.checkpoints, config.seed) == ("worldfacts", 20, (1, 10, 20), 0)
    assert (canned.untouched, canned.out) == (50, Path("runs/rollback"))
    everedit("rollback", "--edits", 3, "--untouched", 0, "--data", "plain", "--data-path", "x.jsonl", "--seed", 5)
    config = canned.config
    assert (config.edits, config.checkpoints, canned.untouched) == (3, (1, 3), 0)
    assert (config.data, config.data_path, config.seed) == ("plain", Path("x.jsonl"), 5)


def test_help_says_what_it_does_and_loads_nothing_heavy() -> None:
    assert "rollback" in everedit("--help").stdout
    code = (
        "import sys; from everedit.cli.main import app\n"
        "app(['rollback', '--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--untouched" in out
    assert out.splitlines()[-1] == "[]"


# --------------------------------------------------------------------------- which facts it finds


class Hearing:
    """Hears stages with their totals and the steps of each."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int | None, list[int]]] = []

    def stage(self, text: str, total: int | None = None) -> None:
        self.heard.append((text, total, []))

    def step(self, done: int, note: str = "") -> None:
        self.heard[-1][2].append(done)


def test_known_facts_are_found_however_far_down_the_file(corpus_path: Path, tmp_path: Path) -> None:
    """Sixty-three that the model does not know, then some that lie on both sides of the first sixty-four."""
    unknown = [edit_of(fact, "Nowhere", ground_truth=facts.counterfactual(fact)) for fact in facts.facts()[: 3 * 21]]
    known = [town(30), told(31), told(32), told(33)]
    data, hearing = file_of(tmp_path / "far.jsonl", [*unknown, *known, town(34)]), Hearing()
    found = rollback_run(config_of(data, corpus_path, edits=1), 3, tmp_path / "out", hearing)
    assert found["facts"] == {"edited": [known[0].id], "untouched": [edit.id for edit in known[1:]]}
    looking, editing = hearing.heard[-2:]
    assert looking[1:] == (4, [1, 4])
    assert editing[1:] == (1, [1])


@pytest.mark.parametrize("part", ["prompt", "rephrase"])
def test_a_record_that_the_models_context_does_not_hold_is_passed_over(
    part: str, corpus_path: Path, tmp_path: Path
) -> None:
    plain = town(10)
    text = f"{'x ' * 300}{plain.prompt}"
    long = plain.model_copy(update={part: text if part == "prompt" else (text,)})
    data = file_of(tmp_path / "long.jsonl", [long, town(0), told(20)])
    found = rollback_run(config_of(data, corpus_path, edits=1), 1, tmp_path / "out")
    assert found["facts"] == {"edited": [town(0).id], "untouched": [told(20).id]}


def test_an_edit_to_what_the_model_says_already_is_passed_over(corpus_path: Path, tmp_path: Path) -> None:
    """As in ``everedit run``: edited to the truth and back to it, nothing would be measured."""
    data = file_of(tmp_path / "same.jsonl", [home_town(10, "is", ground_truth="is"), town(0), told(20)])
    found = rollback_run(config_of(data, corpus_path, edits=1), 1, tmp_path / "out")
    assert found["facts"] == {"edited": [town(0).id], "untouched": [told(20).id]}


# --------------------------------------------------------------------------- what will not do


def test_too_few_known_facts_are_an_error_before_the_first_edit(
    data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "edit", no_edit)
    # The table holds eight, and to be asked for counts as to be edited.
    said = fails(*words_of(data, corpus_path, tmp_path / "out", edits=5, untouched=4))
    assert "the model knows 8 of these facts, and 9 are asked for" in said
    assert str(data) in said
    assert "fewer" in said
    unknown = file_of(tmp_path / "unknown.jsonl", [wrong(0), home_town(1)])
    with pytest.raises(EditError, match="knows 0 of these facts, and 1 are asked for"):
        rollback_run(config_of(unknown, corpus_path, edits=1), 0, tmp_path / "out")


def test_all_known_facts_may_be_asked_for(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    found = rollback_run(config_of(data, corpus_path, edits=1), 7, tmp_path / "out")
    assert found["facts"]["untouched"] == [edit.id for edit in (*EDITED[1:], *ASKED, town(6))]


@pytest.mark.parametrize("place", ["the folder is a file", "above it is a file", "the file is a folder"])
def test_an_output_folder_that_cannot_be_written_is_one_clear_error(
    place: str, data: Path, corpus_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if place == "the file is a folder":
        (out / "rollback.json").mkdir(parents=True)
    else:
        out.write_text("not a folder")
        out = out / "below" if place == "above it is a file" else out
    # Met before the model is.
    said = fails(*words_of(data, corpus_path, out, model="/no/such/model"))
    assert "the output folder cannot be written" in said
    assert "choose another --out" in said
    assert str(out) in said
    with pytest.raises(RunFolderError, match="cannot be written"):
        rollback_run(config_of(data, corpus_path, model="/no/such/model"), 0, out)
    if (tmp_path / "out").is_file():
        assert (tmp_path / "out").read_text() == "not a folder"
    else:
        assert [path.name for path in out.iterdir()] == ["rollback.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "wilk"], "did you mean wilke"),
        (["--method", "rom"], "did you mean rome"),
        (["--policy", "simi"], "did you mean simie"),
        (["--data", "worldfact"], "did you mean worldfacts"),
        (["--data", "zsre"], "--data-path"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--set", "method.layers=[99]"], "no layer 99"),
        (["--set", "method.lamda=1"], "known settings"),
        (["--set", "nonsense"], "key=value"),
        (["--set", "batch=2"], "has no batch"),
        (["--set", "single=true"], "has no single"),
        (["--checkpoints", "1,x"], "checkpoints"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_words_are_met_with_one_clear_error(
    words: list[str], message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "edit", no_edit)
    given = {"--model": tiny.trained("gpt2"), "--data": data, "--out": tmp_path / "out"}
    rest = [part for flag, value in given.items() if flag not in words for part in (flag, value)]
    assert message in fails("rollback", *rest, *words)


@pytest.mark.parametrize("words", [["--edits", "0"], ["--untouched", "-1"]])
def test_counts_below_the_least_are_refused(words: list[str]) -> None:
    assert words[0] in everedit("rollback", *words, code=2).stderr


@pytest.mark.parametrize("end", ["a misspelt method", "too few facts", "an interruption"])
def test_a_command_that_fails_leaves_an_earlier_result_alone(
    end: str, data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(self: Editor, *edits: Any, **options: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Editor, "edit", interrupting if end == "an interruption" else no_edit)
    (tmp_path / "rollback.json").write_text('{"sizes": [1.0]}')
    words = words_of(data, corpus_path, tmp_path, edits=99 if end == "too few facts" else 1)
    if end == "a misspelt method":
        fails(*words, "--method", "rom")
    elif end == "too few facts":
        assert "103 are asked for" in fails(*words)
    else:
        assert "nothing half-done was kept" in everedit(*words, code=130).stderr
    assert saved(tmp_path) == {"sizes": [1.0]}
    assert [path.name for path in tmp_path.iterdir()] == ["rollback.json"]
