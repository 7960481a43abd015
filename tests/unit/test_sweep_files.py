"""The file of a sweep: every combination is a cell; what is wrong is one error that names the file and the key."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.experiments import RunConfig
from everedit.experiments.sweeps import Cell, SweepConfig, cells_of


def cells(text: str, *settings: str) -> list[Cell]:
    return cells_of(SweepConfig.parse(yaml.safe_load(text) or {}, "sweep.yaml"), "sweep.yaml", settings)


def test_every_combination_is_a_cell_in_the_order_of_the_axes() -> None:
    found = cells("{methods: [memit, ft], policies: [accumulate, rect], seeds: [3, 4], run: {edits: 7}}")
    assert [(cell.config.method, cell.config.policy, cell.config.seed) for cell in found] == list(
        itertools.product(("memit", "ft"), ("accumulate", "rect"), (3, 4))
    )
    assert {cell.config.edits for cell in found} == {7}
    assert len({cell.name for cell in found}) == 8
    assert all(cell.name.startswith(f"{cell.config.method}-{cell.config.policy}-worldfacts-") for cell in found)


def test_a_file_of_one_line_is_a_sweep_of_defaults() -> None:
    [cell] = cells("methods: rome")
    assert cell.config == RunConfig(method="rome")


def test_entries_and_rules_set_what_they_say_and_later_ones_win() -> None:
    found = cells(
        """
        run: {edits: 5, stats: {tokens: 512, window_tokens: 64}}
        methods:
          - {name: memit, set: {method.moment_weight: 10, stats.tokens: 1024}}
          - {name: memit, label: strong, set: {method.moment_weight: 1}}
          - ft
        policies: [accumulate, {name: simie, set: {policy.lam: 1e-2}}]
        rules:
          - {when: {method: memit, policy: simie}, set: {method.moment_weight: 30}}
          - {when: {policy: [simie]}, set: {edits: 6}}
        """
    )
    told = {
        (cell.axes["method"], cell.axes["policy"]): (
            cell.config.method_settings, cell.config.policy_settings, cell.config.edits, cell.config.stats.tokens
        )
        for cell in found
    }  # fmt: skip
    assert told == {
        ("memit", "accumulate"): ({"moment_weight": 10}, {}, 5, 1024),
        ("memit", "simie"): ({"moment_weight": 30}, {"lam": 0.01}, 6, 1024),
        ("strong", "accumulate"): ({"moment_weight": 1}, {}, 5, 512),
        ("strong", "simie"): ({"moment_weight": 1}, {"lam": 0.01}, 6, 512),
        ("ft", "accumulate"): ({}, {}, 5, 512),
        ("ft", "simie"): ({}, {"lam": 0.01}, 6, 512),
    }
    assert {cell.config.stats.window_tokens for cell in found} == {64}


def test_flags_win_over_the_file() -> None:
    text = """
        run: {edits: 5, stats: {window_tokens: 64}}
        methods: [{name: memit, set: {edits: 6, method.moment_weight: 1, method.share: sqrt}}]
    """
    [cell] = cells(text, "edits=2", "stats.tokens=99", "method.moment_weight=3")
    # A group of settings keeps those that are not named.
    assert (cell.config.edits, cell.config.stats.tokens, cell.config.stats.window_tokens) == (2, 99, 64)
    assert cell.config.method_settings == {"moment_weight": 3, "share": "sqrt"}


def test_groups_of_settings_add_up_and_a_value_is_replaced_as_a_whole() -> None:
    [cell] = cells(
        """
        run: {stats: {tokens: 512}, method_settings: {ridge: 2, modules: {mlp_out: [1], mlp_in: [2]}}}
        methods: [{name: ultraedit, set: {stats: {window_tokens: 64}, method_settings: {modules: {mlp_out: [3]}}}}]
        """
    )
    assert (cell.config.stats.tokens, cell.config.stats.window_tokens) == (512, 64)
    assert cell.config.method_settings == {"ridge": 2, "modules": {"mlp_out": [3]}}


def test_what_cannot_work_together_is_skipped_with_the_reason() -> None:
    found = cells(
        """
        methods: [memit, grace, rome, ft]
        policies: [accumulate, simie, nas]
        run: {batch: 2}
        rules: [{when: {method: ft, policy: simie}, skip: not asked for}]
        """
    )
    why = {(cell.config.method, cell.config.policy): cell.skipped for cell in found}
    assert [pair for pair, reason in why.items() if not reason] == [
        ("memit", "accumulate"), ("memit", "simie"), ("memit", "nas"), ("ft", "accumulate"),
    ]  # fmt: skip
    assert "grace changes the" in why["grace", "simie"]
    assert "one edit at a time" in why["rome", "accumulate"]
    assert "solves for none" in why["ft", "nas"]
    assert why["ft", "simie"] == "not asked for"


def test_a_policy_that_shows_the_stream_has_nothing_beneath() -> None:
    found = cells("{methods: [memit], policies: [nas, prune], run: {beneath: true}}")
    assert ["nothing is beneath" in cell.skipped for cell in found] == [True, False]


def test_a_cells_name_changes_with_its_settings_and_with_nothing_else() -> None:
    [one], [same], [other] = (
        cells(f"{{title: {title}, run: {{edits: {edits}}}}}") for title, edits in (("a", 5), ("b", 5), ("a", 6))
    )
    assert one.name == same.name != other.name
    assert Cell.from_dict(one.as_dict()) == one
    # What a setting is by default is not a setting: results outlive keys that are added later.
    [said] = cells("{run: {edits: 5, single: false, known: quarantine}}")
    assert said.name == one.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: [rom]", ["methods.0", "unknown method 'rom'", "did you mean rome"]),
        ("policies: [accumulate, simi]", ["policies.1", "did you mean simie"]),
        ("data: [worldfact]", ["data.0", "did you mean worldfacts"]),
        ("data: [zsre]", ["data.0", "--data-path"]),
        ("data: [{name: zsre, path: nowhere.jsonl}]", ["data.0", "nowhere.jsonl"]),
        ("colour: red", ["colour", "known keys: title"]),
        ("run: {colour: red}", ["run", "'colour' is no key of a run"]),
        ("run: {method: rome}", ["run", "list it under 'methods'"]),
        ("run: {edits: many}", ["run", "edits: Input should be a valid integer"]),
        ("{run: {edits: 3}, seeds: [one]}", ["seeds.0"]),
        ("seeds: []", ["seeds"]),
        ("seeds: [1, 2, 1]", ["seeds", "two entries are called 1"]),
        ("methods: [{name: rome, set: {method.layr: 3}}]", ["methods.0.set", "layr", "known settings: "]),
        ("methods: [{name: rome, sett: {}}]", ["methods.0.sett"]),
        ("policies: [{name: simie, set: {policy.lamda: 3}}]", ["policies.0.set", "lamda"]),
        ("methods: [{name: rome, set: {seed: 3}}]", ["methods.0.set", "list it under 'seeds'"]),
        ("methods: [rome, rome]", ["methods", "two entries are called rome", "label"]),
        ("rules: [{when: {method: rome}}]", ["rules.0.when.method", "no entry is called rome"]),
        ("rules: [{when: {colour: red}}]", ["rules.0.when"]),
        ("rules: [{when: {}}]", ["rules.0.when"]),
        ("rules: [{when: {method: memit}, set: {edits: 0}}]", ["rules.0.set", "edits"]),
        ("{methods: [grace], policies: [simie]}", ["every cell is skipped"]),
        ("run: {protocols: [wise/hallucination@1]}", ["run", "not scored under wise/hallucination@1"]),
        ("kind: walk", ["kind", "'run' or 'rollback'"]),
        ("methods: [", ["line 1"]),
        ("[1, 2]", ["a configuration is a mapping of keys"]),
        ("run: {edits: 3}\nrun: {edits: 4}", ["the key 'run' stands twice", "line 1"]),
    ],
)
def test_a_bad_file_is_one_clear_error_that_names_file_and_key(text: str, said: list[str], tmp_path: Path) -> None:
    file = tmp_path / "my sweep.yaml"
    file.write_text(text)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["sweep", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stdout == ""
    message = " ".join(result.stderr.split())
    assert "Traceback" not in message
    for part in ["my sweep.yaml", "what to do:", *said]:
        assert part in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a YAML file"),
        (["--plan"], "give a YAML file"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "--out", "nowhere"], "no sweep to resume"),
        (["FILE", "--set", "colour=red"], "'colour' is no key of a run"),
        (["FILE", "--set", "method=rome"], "list it under 'methods'"),
        (["FILE", "--set", "nonsense"], "key=value"),
        (["FILE", "--ray", "nonsense"], "no address of a Ray cluster"),
        (["FILE", "--ray", "--gpus", "many"], "no number of GPUs"),
    ],
)
def test_bad_words_are_met_with_one_clear_error(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text("methods: [ft]")
    given: list[Any] = ["good.yaml" if word == "FILE" else word for word in words]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["sweep", *given])
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
