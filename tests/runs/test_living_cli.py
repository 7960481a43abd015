"""The commands on living models, run as a user runs them, in processes of their own."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from everedit.cli.main import app
from tests.support import facts, tiny
from tests.support.editing import METHOD_SETTINGS, home_town

pytestmark = pytest.mark.usefixtures("own_cache")
runner = CliRunner(env={"COLUMNS": "200"})
FACT = home_town(0)


def run(*words: str, code: int = 0) -> Result:
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def said(*words: str) -> Any:
    return json.loads(run(*words, "--json").stdout)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A living model of the tiny GPT-2, made by the command."""
    folder = tmp_path_factory.mktemp("bots") / "bot"
    corpus = folder.parent / "facts.txt"
    corpus.write_text("\n".join(facts.sentences()), encoding="utf-8")
    settings = [f"method.{key}={json.dumps(value)}" for key, value in METHOD_SETTINGS["memit"].items()]
    settings += [f"stats.corpus={corpus}", "stats.tokens=4096", "stats.window_tokens=64", "policy.lam=0.0001"]
    settings += ["policy.start=base", "gates.perplexity=null", "gates.lost=null", "gates.norm=null"]
    sets = [word for setting in settings for word in ("--set", setting)]
    run("init", folder, "--model", str(tiny.trained("gpt2")), "--method", "memit", "--policy", "simie", *sets,
        "--device", "cpu")  # fmt: skip
    return folder


@pytest.fixture
def copy(bot: Path, tmp_path: Path) -> Path:
    shutil.copytree(bot, tmp_path / "bot")
    return tmp_path / "bot"


def add(folder: Path, person: int = 0, *more: str, code: int = 0) -> Result:
    edit = home_town(person)
    words = ["--prompt", edit.prompt, "--subject", edit.subject or "", "--target", edit.target_new]
    return run("add", folder, *words, *more, code=code)


def test_a_session_from_the_first_edit_to_the_last(copy: Path) -> None:
    result = add(copy, 0, "--by", "dana", "--source", "https://example.org", "--until", "2027-06-30")
    assert "1 committed, 0 set aside" in result.stdout
    file = copy.parent / "corrections.csv"
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["prompt", "subject", "target_new"])
        for person in (5, 10):
            edit = home_town(person)
            rows.writerow([edit.prompt, edit.subject, edit.target_new])
        rows.writerow(["The home town of Mira Lanner", "Nobody", "Oslo"])
        rows.writerow([FACT.prompt, FACT.subject, "Kyoto"])
    done = said("add", copy, "--file", file, "--by", "erin")
    assert len(done["commits"]) == 2
    assert {(item["why"], item["line"]) for item in done["set_aside"]} == {("bad record", 4), ("conflict", 5)}
    # The same file again: what is held is held.
    again = said("add", copy, "--file", file)
    assert [item["why"] for item in again["set_aside"]].count("held already") == 2
    answers = said("ask", copy, FACT.prompt)
    assert answers[0]["edited"].strip().startswith(FACT.target_new)
    assert answers[0]["base"] != answers[0]["edited"]
    log = said("log", copy)
    assert [commit["edits"][0]["by"] for commit in log] == ["erin", "erin", "dana"]
    assert "dana" in run("log", copy).stdout
    everything = said("log", copy, "--all")
    assert [event["action"] for event in everything["events"]] == ["conflict", "conflict"]
    first = log[-1]["id"]
    shown = said("show", copy, first[:10])
    assert shown["edits"][0]["source"] == "https://example.org"
    assert "https://example.org" in run("show", copy, first[:10]).stdout
    found = said("diff", copy, first[:10], log[0]["id"][:10])
    assert len(found["added"]) == 2
    assert found["weights"]
    assert "+ The home town" in run("diff", copy, "base", first[:10]).stdout
    assert "3 commits, every bit as it was committed" in run("verify", copy).stdout
    forgotten = said("forget", copy, log[1]["id"][:10])
    assert forgotten["how"] == "downdate"
    assert "checkout" in run("undo", copy).stdout
    assert "now at the base model" in run("undo", copy, "3").stdout
    assert log[0]["id"][:12] in run("checkout", copy, log[0]["id"][:12]).stdout
    assert said("conflicts", copy) == []
    assert said("expire", copy)["expired"] == []
    stale = said("expire", copy, "--today", "2028-01-01")
    assert ([item["edit"]["prompt"] for item in stale["expired"]], stale["forgotten"]) == ([FACT.prompt], [])
    assert "to forget them: --apply" in run("expire", copy, "--today", "2028-01-01").stdout
    assert said("expire", copy, "--today", "2028-01-01", "--apply")["forgotten"][0]["why"] == "expired"
    kept = said("retention", copy)
    assert kept["edits"] == 2
    assert Path(kept["figure"]).read_text().startswith("<?xml")
    assert "of 2 edits held" in run("retention", copy, "--no-blame").stdout


def test_exports_and_imports(copy: Path) -> None:
    add(copy, 0, "--by", "dana")
    out = copy.parent / "merged"
    done = said("export", copy, "--format", "merged", "--out", out, "--no-measure")
    assert "model.safetensors" in done["files"]
    card = copy.parent / "card"
    run("export", copy, "--format", "card", "--out", card)
    assert FACT.prompt in (card / "README.md").read_text()
    assert "dana" in (card / "README.md").read_text()
    peer = copy.parent / "peer"
    base = str(tiny.trained("gpt2"))
    assert "commit" in run("open", out, "--into", peer, "--base", base, "--source", "a peer", "--device", "cpu").stdout
    assert said("log", peer)[0]["kind"] == "import"
    assert said("ask", peer, FACT.prompt)[0]["edited"] == said("ask", copy, FACT.prompt)[0]["edited"]
    assert run("export", copy, "--format", "merged", "--out", out, "--no-measure", code=1).exit_code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "BOT", "--prompt", "x"], "there is no target"),
        (["add", "BOT"], "give either a prompt and a target, or a file"),
        (["add", "BOT", "--file", "CSV"], "lacks the column target or target_new"),
        (["add", "BOT", "--prompt", "Home", "--target", "x", "--until", "soon"], "is no date"),
        (["add", "BOT", "--prompt", "Home", "--target", "x", "--on-conflict", "maybe"], "on_conflict"),
        (["undo", "BOT"], "there are only 0 commits to undo"),
        (["forget", "BOT", "abcd"], "names no commit"),
        (["forget", "BOT", "abcd", "--how", "magic"], "no way to forget"),
        (["checkout", "BOT", "zz"], "names no commit"),
        (["show", "BOT", "1234"], "names no commit"),
        (["log", "NOWHERE"], "there is no living model here"),
        (["ask", "NOWHERE", "x"], "there is no living model here"),
        (["init", "BOT"], "there is something in this place already"),
        (["init", "NEW", "--method", "memmit"], "unknown method"),
        (["init", "NEW", "--set", "gates.colour=red"], "gates.colour"),
        (["export", "BOT", "--format", "floppy", "--out", "NEW"], "unknown format"),
    ],
)
def test_bad_input_is_one_clear_error(words: list[str], message: str, bot: Path, tmp_path: Path) -> None:
    (tmp_path / "edits.csv").write_text("prompt,subject\nHome,x\n")
    places = {"BOT": bot, "NOWHERE": tmp_path / "nowhere", "NEW": tmp_path / "new", "CSV": tmp_path / "edits.csv"}
    files = {path: path.read_bytes() for path in bot.rglob("*") if path.is_file() and path.name != "lock"}
    result = run(*[str(places.get(word, word)) for word in words], code=1)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "nowhere").exists()
    after = {path: path.read_bytes() for path in bot.rglob("*") if path.is_file() and path.name != "lock"}
    assert {path.name for path in after} == {path.name for path in files}
    assert all(after[path] == raw for path, raw in files.items() if path.suffix != ".db")
