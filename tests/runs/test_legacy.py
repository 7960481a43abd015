"""The scripts of SimIE, PRUNE and WilKE by their own flags: the command of ours that is shown is the one that runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click.testing import Result
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.compat.scripts import run_words
from everedit.experiments import RunConfig
from tests.support import facts, tiny
from tests.support.editing import home_town, probes
from tests.support.running import rows_of

pytestmark = pytest.mark.usefixtures("own_cache")

ROME = {
    "layers": [1], "fact_token": "subject_last", "v_num_grad_steps": 8, "v_lr": "5e-1", "v_loss_layer": 3,
    "v_weight_decay": 0, "clamp_norm_factor": 10, "kl_factor": 0, "mom2_adjustment": False,
    "context_template_length_params": [[6, 2]],
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as these repositories have it: files of hyper-parameters and data; it is the working folder."""
    model = str(tiny.trained("gpt2"))
    (tmp_path / "hparams" / "ROME").mkdir(parents=True)
    (tmp_path / "hparams" / "ROME" / "tiny.yaml").write_text(
        yaml.safe_dump({"alg_name": "ROME", "model_name": model, "device": 3, **ROME}), encoding="utf-8"
    )
    (tmp_path / "hparams" / "WilKE").mkdir()
    (tmp_path / "hparams" / "WilKE" / "tiny.json").write_text(
        json.dumps({"scanning_ceiling": 2, **ROME, "layers": []}), encoding="utf-8"
    )
    people = [person for person in range(12) if home_town(person).target_new != facts.facts()[3 * person].answer]
    zsre = [
        {
            "subject": edit.subject, "src": edit.prompt, "alt": edit.target_new, "rephrase": f"Yes. {edit.prompt}",
            "loc": probes()[0].prompt, "loc_ans": probes()[0].answer, "answers": [facts.facts()[3 * person].answer],
        }
        for person in people
        for edit in [home_town(person)]
    ]  # fmt: skip
    (tmp_path / "data" / "ZsRE").mkdir(parents=True)
    for name in ("zsre_mend_edit.json", "zsre_mend_train.json"):
        (tmp_path / "data" / "ZsRE" / name).write_text(json.dumps(zsre), encoding="utf-8")
    counterfact = [
        {
            "case_id": person,
            "requested_rewrite": {
                "prompt": "The home town of {} is", "subject": facts.SUBJECTS[person],
                "target_new": {"str": home_town(person).target_new},
                "target_true": {"str": facts.facts()[3 * person].answer},
            },
            "paraphrase_prompts": [f"Yes. The home town of {facts.SUBJECTS[person]} is"],
            "neighborhood_prompts": [f"The home town of {facts.SUBJECTS[-1]} is"],
        }
        for person in people
    ]  # fmt: skip
    for name in ("counterfact.json", "counterfact_tiny_known.json"):
        (tmp_path / "data" / name).write_text(json.dumps(counterfact), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def legacy(*words: object, code: int = 0) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["legacy", *map(str, words)])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def shown(*words: object) -> list[str]:
    """The words of the one command that is shown."""
    return shlex.split(legacy(*words, "--show").stdout.strip())


def settings_of(words: list[str]) -> dict[str, str]:
    chosen = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    return dict(setting.split("=", 1) for setting in chosen)


def flags_of(words: list[str]) -> dict[str, str]:
    return {
        word.removeprefix("--"): words[at + 1]
        for at, word in enumerate(words)
        if word.startswith("--") and word != "--set"
    }


# --------------------------------------------------------------------------- what is shown is what runs


def test_simie_runs_what_it_shows(checkout: Path) -> None:
    flags = ["simie", "--editing_method", "ROME", "--model_name", "tiny", "--data_type", "ZsRE", "--ds_size", 3]
    flags += ["--simIE", "--lamHyper", "1e-4", "--init_model", "--solver", "LU", "--sequential_edit"]
    words = shown(*flags)
    assert words[:2] == ["everedit", "run"]
    done = legacy(*flags)
    assert shlex.split(done.stdout.splitlines()[0]) == words
    out = checkout / flags_of(words)["out"]
    assert out.name == "tiny_ROME_N=3_Sequential=True_True_0.0001_True"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["method"], config["policy"], config["edits"]) == ("rome", "simie", 3)
    assert config["settings"]["policy"] == {"lam": 1e-4, "start": "base", "solver": "cholesky"}
    method = config["settings"]["method"]
    assert (method["layer"], method["second_moments"], method["target"]["lr"]) == (1, False, 0.5)
    assert config["protocols"] == ["teacher-forced/token-accuracy@1"]
    # Typed by hand, the command that was shown does the same, edit for edit.
    again = CliRunner().invoke(app, [*words[1:], "--out", str(checkout / "again")])
    assert again.exit_code == 0, again.stderr
    rows = [
        [row["update_norm"] for row in rows_of(folder) if row["kind"] == "edit"] for folder in (out, checkout / "again")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_prune_saves_loads_and_summarizes(checkout: Path) -> None:
    flags = ["--alg_name", "ROME", "--model_name", "tiny", "--ds_name", "cf", "--dataset_size", 6]
    save = shown("prune", "save", *flags)
    assert flags_of(save)["checkpoints"] == "5,6"
    assert flags_of(save)["policy"] == "accumulate"
    load = ["prune", "load", *flags, "--seq_num", 2, "--reduce_type", "log", "--dir_name", "ROME", "--cuda", 0]
    legacy(*load)
    out = checkout / "results" / "cf" / "reduce_log" / "ROME_2" / "tiny"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["policy"], config["settings"]["policy"]["function"], config["edits"]) == ("prune", "log", 2)
    assert config["protocols"] == ["probability-comparison@1"]
    scores = json.loads((out / "summary.json").read_text(encoding="utf-8"))["protocols"]["probability-comparison@1"]
    assert scores["checkpoints"]["2"]["retained"]["locality"] is not None
    (out / "report.html").unlink()
    assert "report" in legacy("prune", "summarize", "--dir_name", "cf/reduce_log/ROME_2/tiny").stdout
    assert (out / "report.html").exists()


def test_wilke_edits_facts_and_edits_them_back(checkout: Path) -> None:
    flags = ["wilke", "--alg_name", "WilKE", "--model_name", "tiny", "--hparams_fname", "tiny.json", "--ds_name"]
    flags += ["counterfact", "--dataset_size_limit", 6, "--edit_times", 3, "--skip_generation_tests"]
    flags += ["--model", tiny.trained("gpt2"), "--set", "stats.tokens=512"]
    words = shown(*flags)
    assert words[:2] == ["everedit", "rollback"]
    found = flags_of(words)
    assert (found["edits"], found["untouched"], found["checkpoints"]) == ("3", "3", "1,2")
    assert settings_of(words)["method.layers"] == "[0, 1]"
    done = legacy(*flags)
    assert shlex.split(done.stdout.splitlines()[0]) == words
    result = json.loads((checkout / "results" / "WilKE" / "tiny" / "rollback.json").read_text(encoding="utf-8"))
    assert list(result["checkpoints"]) == ["1", "2", "3"]
    assert len(result["sizes"]) == 6


# --------------------------------------------------------------------------- what the flags mean


@pytest.mark.parametrize(
    ("flags", "policy", "settings"),
    [
        (["--simIE"], "simie", {"policy.lam": "1.0", "policy.start": "current"}),
        (["--simIE", "--lamHyper", "10", "--init_model"], "simie", {"policy.lam": "10.0", "policy.start": "base"}),
        ([], "accumulate", {}),
        (["--editing_method", "PRUNE"], "prune", {"policy.function": "log1_2"}),
    ],
)
def test_simies_policies(checkout: Path, flags: list[str], policy: str, settings: dict[str, str]) -> None:
    words = shown("simie", "--model_name", "tiny", "--ds_size", 60, *flags)
    assert flags_of(words)["policy"] == policy
    assert flags_of(words)["checkpoints"] == "1,10,50,60"
    assert flags_of(words)["data-path"] == "data/ZsRE/zsre_mend_edit.json"
    found = settings_of(words)
    assert {key: value for key, value in found.items() if key in settings} == settings
    assert (found["known"], found["contradictions"]) == ("keep", "keep")


def test_a_model_needs_no_file(checkout: Path) -> None:
    words = shown("simie", "--editing_method", "WISE", "--model_name", "smollm2-135m", "--data_type", "counterfact")
    assert flags_of(words)["model"] == "smollm2-135m"
    assert flags_of(words)["data-path"] == "data/counterfact/counterfact-edit.json"
    assert settings_of(words)["method.irrelevant_path"] == "data/counterfact/counterfact-train.json"
    words = shown("simie", "--model_name", "tiny", "--model", "smollm2-135m", "--data_type", "hallucination")
    assert flags_of(words)["model"] == "smollm2-135m"
    assert "perplexity" in legacy("simie", "--model_name", "tiny", "--data_type", "hallucination", "--show").stderr
    words = shown("simie", "--editing_method", "FT", "--model_name", tiny.trained("gpt2"))
    assert flags_of(words)["method"] == "ft"
    assert flags_of(shown("simie", "--model_name", "org/a-model"))["model"] == "org/a-model"
    # All records of the file, where no number is given.
    words = shown("prune", "save", "--alg_name", "MEMIT", "--model_name", "smollm2-135m")
    assert flags_of(words)["edits"] == str(len(json.loads(Path("data/counterfact.json").read_text())))


def test_the_hubs_names_of_gpt2(checkout: Path) -> None:
    words = shown("wilke", "--model_name", "gpt2-xl", "--hparams_fname", "tiny.json")
    assert flags_of(words)["model"] == "openai-community/gpt2-xl"
    assert flags_of(words)["data-path"] == "data/counterfact_gpt2-xl_known.json"
    assert (flags_of(words)["edits"], flags_of(words)["untouched"]) == ("1024", "1024")
    assert flags_of(words)["checkpoints"].startswith("1,2,4,8,16,32,50,64,100,128,150")
    words = shown("wilke", "--model_name", "EleutherAI/gpt-j-6B", "--hparams_fname", "tiny.json", "--edit_times", 1)
    assert flags_of(words)["data-path"] == "data/counterfact_EleutherAI_gpt-j-6B_known.json"


CONFIGS: list[dict[str, Any]] = [
    {},
    {"method": "ultraedit", "method_settings": {"modules": {"mlp_out": [1, 2]}, "eta": 1e-07}, "batch": 100},
    {"method": "rome", "method_settings": {"target": {"lr": 0.5}, "contexts": [[5, 10]], "second_moments": False}},
    {"policy": "nas+simie", "policy_settings": {"simie": {"lam": 1e4, "start": "base"}, "nas": {"anchor": 2.5}}},
    {"method": "ike", "method_settings": {"encoder": "a folder/mini lm", "scope": -1.0, "self_copy": True}},
    {"dtype": "bfloat16", "device": "cpu", "known": "keep", "stats": {"imported": "wikipedia"}, "seed": 3},
    {"protocols": ["probability-comparison@1"], "checkpoints": [2, 7], "edits": 9, "data_path": "some file.json"},
]


@pytest.mark.parametrize("values", CONFIGS, ids=lambda values: "-".join(values) or "usual")
def test_the_words_of_a_config_are_read_back_as_that_config(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(values)
    seen: list[RunConfig] = []
    monkeypatch.setattr("everedit.cli.run.execute", lambda found, out, json: seen.append(found))
    words = run_words(config, tmp_path / "a run")
    line = shlex.split(shlex.join(words))
    typer.main.get_command(app).main(line[1:], standalone_mode=False)
    assert seen == [config]


# --------------------------------------------------------------------------- what a file means


def test_a_file_is_explained(checkout: Path) -> None:
    found = json.loads(legacy("hparams", "hparams/ROME/tiny", "--json").stdout)
    assert (found["method"], found["settings"]["method.layer"]) == ("rome", 1)
    assert "device" in found["ignored"]
    text = legacy("hparams", "hparams/ROME/tiny.yaml").stdout
    assert "method.target.lr" in text
    assert "the best device at hand is used" in text
    (checkout / "odd.yaml").write_text("alg_name: ROME\nv_lrr: 1\n", encoding="utf-8")
    assert "did you mean v_lr?" in legacy("hparams", "odd").stderr
    assert "WilKE" not in legacy("hparams", "hparams/WilKE/tiny.json", "--alg_name", "WilKE").stderr


# --------------------------------------------------------------------------- bad input

BAD: list[tuple[list[object], str]] = [
    (["simie", "--editing_method", "MEMITT", "--model_name", "tiny"], "--editing_method 'MEMITT'.*did you mean MEMIT"),
    (["simie", "--data_type", "zsre", "--model_name", "tiny"], "--data_type 'zsre'.*did you mean ZsRE"),
    (["simie", "--model_name", "llama-7b"], "--model_name llama-7b.*hparams/ROME/llama-7b"),
    (["simie", "--model_name", "tiny", "--simIE", "--solver", "QR"], "solver is 'QR'.*Cholesky"),
    (["simie", "--model_name", "tiny", "--data_dir", "nowhere"], "nowhere/ZsRE"),
    (["prune", "sav", "--model_name", "tiny"], "step 'sav'.*did you mean save"),
    (["prune", "--alg_name", "BIRD", "--model_name", "tiny"], "--alg_name 'BIRD'"),
    (["prune", "--model_name", "tiny", "--ds_name", "bi_cf_qa"], "--ds_name 'bi_cf_qa'.*choose one of: cf"),
    (["prune", "--model_name", "tiny", "--reduce_type", "log3"], "--reduce_type 'log3'.*did you mean log"),
    (["prune", "summarize"], "--dir_name is missing"),
    (["prune", "summarize", "--dir_name", "none"], "results/none"),
    (["wilke", "--hparams_fname", "none.json"], "--hparams_fname none.json"),
    (["wilke", "--hparams_fname", "tiny.json", "--ds_name", "zsre"], "--ds_name 'zsre'"),
    (["wilke", "--hparams_fname", "tiny.json", "--edit_times", 9, "--dataset_size_limit", 8], "--edit_times is 9"),
    (["hparams", "hparams/WilKE/tiny.json"], "give --alg_name"),
    (["hparams", "nothing"], "no such file of hyper-parameters"),
]


@pytest.mark.parametrize(
    ("words", "said"), BAD, ids=lambda part: " ".join(map(str, part[:3])) if isinstance(part, list) else None
)
def test_bad_flags_are_named(checkout: Path, words: list[object], said: str) -> None:
    result = legacy(*words, code=1)
    text = " ".join(result.stderr.split())
    assert "Traceback" not in text
    assert "what to do" in text
    assert re.search(said, text), text
    assert not (checkout / "outputs").exists()
