"""Hyper-parameter files of other code: every published key is mapped or has a reason, and bad ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from everedit.compat.classes import CLASSES, hparams_class
from everedit.compat.easyedit import (
    AlphaEditHyperParams,
    CompatibilityWarning,
    FTHyperParams,
    GraceHyperParams,
    HyperParams,
    IKEHyperParams,
    KNHyperParams,
    MEMITHyperParams,
    MENDHyperParams,
    MENDTrainingHparams,
    R_ROMEHyperParams,
    ROMEHyperParams,
    SERACHparams,
    SimIEHyperParams,
    UltraEditHyperParams,
    WISEHyperParams,
)
from everedit.compat.rules import Ignored, Mapped
from everedit.compat.tables import ALGORITHMS
from everedit.engine.settings import validated
from everedit.errors import EditError, UnknownName
from everedit.methods import method_class, method_names
from everedit.policies import policy_class
from everedit.training import TrainConfig

PUBLISHED: dict[str, list[str]] = json.loads(
    (Path(__file__).parents[1] / "support" / "published_keys.json").read_text(encoding="utf-8")
)["keys"]
ROME = {"layers": [5], "v_lr": "5e-1", "v_num_grad_steps": 25, "mom2_adjustment": False, "device": 0}


def write(file: Path, values: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values) if file.suffix == ".json" else yaml.safe_dump(values), encoding="utf-8")
    return file


def settings_of(hparams: HyperParams) -> dict[str, Any]:
    """The method's settings, as our own configs take them."""
    config = hparams.run_config()
    validated(method_class(config.method).Config, config.method_settings, config.method)
    return config.method_settings


# --------------------------------------------------------------------------- keys


@pytest.mark.parametrize("folder", PUBLISHED)
def test_every_published_key_is_mapped_or_ignored_for_a_reason(folder: str) -> None:
    table = ALGORITHMS[folder.removeprefix("TRAINING/")].table
    assert [key for key in PUBLISHED[folder] if key not in table] == []
    for key in PUBLISHED[folder]:
        rule = table[key]
        assert isinstance(rule, Mapped) or len(rule.why) > 10


def test_the_published_files_of_the_issue_are_all_there() -> None:
    wanted = {"FT", "ROME", "MEMIT", "KN", "IKE", "MEND", "SERAC", "WISE", "GRACE", "AlphaEdit", "UltraEdit"}
    assert wanted <= PUBLISHED.keys()
    assert all(len(keys) > 10 for keys in PUBLISHED.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda algorithm: algorithm.name)
def test_every_place_is_a_setting_of_ours(algorithm: Any) -> None:
    """A table that names a setting which does not exist would fail only when somebody's file has the key."""
    names = [algorithm.method] if isinstance(algorithm.method, str) else []
    configs = [method_class(name).Config for name in names if name]
    if algorithm.name == "FT":
        configs = [method_class(name).Config for name in ("ft", "ft-l", "ft-m")]
    if algorithm.name == "R-ROME":
        configs = [method_class("r-rome").Config]
    places = [place for rule in algorithm.table.values() if isinstance(rule, Mapped) for place in rule.places]
    for place in [*places, *algorithm.always]:
        head, _, name = place.partition(".")
        if head == "method":
            assert all(name.partition(".")[0] in config.model_fields for config in configs), place
        elif head == "policy":
            assert name in policy_class("simie").Config.model_fields
        elif head == "train":
            assert name in TrainConfig.model_fields
        else:
            assert place in {"algorithm", "model", "batch", "seed", "dtype", "results", "protocol"}


def test_every_method_has_a_class_and_every_class_an_algorithm() -> None:
    assert {kind.algorithm.name for kind in CLASSES} == ALGORITHMS.keys()
    named = {"marginalia", "ft", "ft-l", "ft-m", "r-rome"}
    named |= {a.method for a in ALGORITHMS.values() if isinstance(a.method, str)}
    assert set(method_names()) <= named


def test_an_unknown_key_gets_a_warning_with_the_near_name(tmp_path: Path) -> None:
    file = write(tmp_path / "rome.yaml", {**ROME, "v_num_grad_step": 3})
    with pytest.warns(CompatibilityWarning, match="did you mean v_num_grad_steps") as heard:
        hparams = ROMEHyperParams.from_hparams(file)
    assert str(file) in str(heard[0].message)
    assert heard[0].filename == __file__
    assert "not known" in hparams.ignored["v_num_grad_step"]
    assert "v_num_grad_step" not in settings_of(hparams)
    with pytest.warns(CompatibilityWarning, match="did you mean layers") as heard:
        hparams.layer = 3
    assert heard[0].filename == __file__
    with pytest.warns(CompatibilityWarning, match="it changes nothing"):
        ROMEHyperParams(zzz=3)


def test_what_is_ignored_is_listed_with_its_reason() -> None:
    hparams = ROMEHyperParams(**ROME, stats_dir="./data", rewrite_module_tmp="transformer.h.{}.mlp.c_proj")
    assert set(hparams.ignored) == {"device", "stats_dir", "rewrite_module_tmp"}
    assert "everedit stats import" in hparams.ignored["stats_dir"]


# --------------------------------------------------------------------------- meaning


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@pytest.mark.parametrize("extension", [True, False])
def test_files_are_found_with_and_without_their_extension(suffix: str, extension: bool, tmp_path: Path) -> None:
    file = write(tmp_path / f"llama-3.2-3b{suffix}", {"alg_name": "ROME", **ROME})
    hparams = ROMEHyperParams.from_hparams(str(file if extension else file.with_name("llama-3.2-3b")))
    assert hparams.to_dict() == {"alg_name": "ROME", **ROME}
    assert settings_of(hparams) == {"layer": 5, "second_moments": False, "target": {"lr": 0.5, "steps": 25}}


def test_attributes_can_be_changed_as_scripts_do() -> None:
    hparams = ROMEHyperParams(**ROME)
    hparams.layers, hparams.model_name = [7], "smollm2-135m"
    config = hparams.run_config()
    assert (config.model, config.method, config.method_settings["layer"]) == ("smollm2-135m", "rome", 7)


@pytest.mark.parametrize(
    ("values", "method", "settings"),
    [
        ({"norm_constraint": False, "objective_optimization": "prompt_last"}, "ft", {"objective": "prompt_last"}),
        ({"norm_constraint": "5e-5", "objective_optimization": "promptz_last"}, "ft-l",
         {"box": 5e-5, "objective": "prompt_last"}),
        ({"objective_optimization": "target_new", "batch_size": 3}, "ft-m",
         {"objective": "target_new", "rows_a_step": 3}),
    ],
)  # fmt: skip
def test_ft_is_one_of_three_methods(values: dict[str, Any], method: str, settings: dict[str, Any]) -> None:
    hparams = FTHyperParams(layers=[21], num_steps=25, lr="5e-4", kl_factor=0, weight_decay=0, **values)
    wanted = {"layers": [21], "steps": 25, "lr": 5e-4, "weight_decay": 0.0, **settings}
    assert (hparams.run_config().method, settings_of(hparams)) == (method, wanted)


CASES: list[tuple[type[HyperParams], dict[str, Any], dict[str, Any]]] = [
    (WISEHyperParams,
     {"inner_params": ["model.layers[27].mlp.down_proj.weight"], "act_margin": [5.0, 20.0, 10.0], "save_freq": 500,
      "merge_freq": 1000, "retrieve": True, "mask_ratio": 0.2, "densities": 0.53, "weights": 1.0, "merge_alg": "ties"},
     {"layer": 27, "margins": [5.0, 20.0, 10.0], "shard_edits": 500, "shards": 2, "memories": "retrieve",
      "density": 0.2, "kept": 0.53}),
    (GraceHyperParams,
     {"inner_params": ["transformer.h[35].mlp.c_fc.weight"], "eps": 1.0, "n_iter": 50, "replacement": "replace_last",
      "eps_expand": "coverage", "val_init": "cold", "val_reg": "None", "dist_fn": "euc"},
     {"layer": 35, "radius": 1.0, "steps": 50, "replace": "last", "expand": "coverage", "start": "cold"}),
    (KNHyperParams, {"steps": 1, "adaptive_threshold": 0.2, "p": 0.4, "batch_size": 20},
     {"threshold": 0.2, "share": 0.4}),
    (KNHyperParams, {"steps": 20}, {"steps": 20}),
    (IKEHyperParams, {"k": 8, "sentence_model_name": "./all-MiniLM-L6-v2"},
     {"k": 8, "encoder": "./all-MiniLM-L6-v2", "scope": -1.0, "order": "descending", "self_copy": False}),
    (IKEHyperParams, {"use_icl_examples": False},
     {"k": 0, "scope": -1.0, "order": "descending", "self_copy": False}),
    (AlphaEditHyperParams, {"layers": [4, 5], "L2": 10, "nullspace_threshold": "2e-2", "mom2_update_weight": 15000,
     "P_loc": "p.pt", "Pre": 0}, {"layers": [4, 5], "ridge": 10.0, "threshold": 0.02, "keep_previous": False}),
    (UltraEditHyperParams,
     {"inner_params": ["model.layers.11.mlp.gate_proj", "model.layers.12.mlp.gate_proj", "model.layers.18.mlp.up_proj"],
      "lr": "1e-6", "token": "ans", "batch_size": 100, "batch_size_once": 10, "half": True},
     {"modules": {"mlp_gate": [11, 12], "mlp_up": [18]}, "eta": 1e-6, "positions": "answers", "chunk": 10}),
    (R_ROMEHyperParams, {"layers": [5], "enable_prompt_keys": True, "enable_random_prefix_keys": False},
     {"layer": 5, "key": "bare"}),
    (MENDHyperParams, {"inner_params": ["model.layers.29.mlp.up_proj.weight", "model.layers.31.mlp.down_proj.weight"],
     "edit_lr": "1e-4", "lr_lr": "1e-4", "lr": "1e-6", "n_hidden": 1, "rank": 1920, "shared": True, "norm": True},
     {"layers": [29, 31], "step": 1e-4, "step_lr": 1e-4, "lr": 1e-6, "blocks": 2, "rank": 1920, "shared": True,
      "normalise": True}),
    (MENDHyperParams, {"inner_params": ["encoder.block.22.layer.1.DenseReluDense.wi.weight",
     "decoder.block.23.layer.2.DenseReluDense.wo.weight"]}, {"layers": [23]}),
    (SERACHparams, {"small_name": "./gpt2", "cls_name": "distilbert-base-cased", "supervised": False, "cedit": 0.1},
     {"counterfactual": "./gpt2", "encoder": "distilbert-base-cased", "mode": "soft", "c_edit": 0.1,
      "pooling": "first", "unit": False}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "theirs", "ours"), CASES, ids=lambda part: getattr(part, "__name__", None))
def test_what_a_file_says_in_our_words(kind: type[HyperParams], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert settings_of(kind(**theirs)) == ours


def test_batch_dtype_and_seed_are_the_runs() -> None:
    config = UltraEditHyperParams(batch_size=100, half=True).run_config()
    assert (config.method, config.batch, config.dtype) == ("ultraedit", 100, "bfloat16")
    assert ROMEHyperParams(fp16=True).run_config().dtype == "float16"
    assert ROMEHyperParams(fp16=False).run_config().dtype is None
    assert MENDHyperParams(seed=42).run_config().seed == 42


def test_settings_of_our_own_win_and_nest() -> None:
    own = {"method_settings": {"target": {"lr": 0.1}, "contexts": [[6, 2]]}, "policy": "simie", "seed": 3}
    config = ROMEHyperParams(**ROME, everedit=own).run_config()
    assert config.method_settings["target"] == {"lr": 0.1, "steps": 25}
    assert (config.method_settings["contexts"], config.policy, config.seed) == ([[6, 2]], "simie", 3)
    with pytest.raises(EditError, match="everedit is no mapping"):
        ROMEHyperParams(everedit="simie").run_config()
    with pytest.raises(EditError, match="polisy"):
        ROMEHyperParams(everedit={"polisy": "simie"}).run_config()


def test_simie_reads_its_base_methods_file(tmp_path: Path) -> None:
    write(tmp_path / "ROME" / "gpt2.yaml", {"alg_name": "ROME", "model_name": "./gpt2", **ROME})
    values = {"alg_name": "SimIE", "model_name": "smollm2-135m", "base_method": "ROME", "lamHyper": 1e4}
    file = write(tmp_path / "SimIE" / "gpt2.yaml", {**values, "init_model": True, "solver": "LU", "fast": False})
    config = SimIEHyperParams.from_hparams(file).run_config()
    assert (config.model, config.method, config.policy) == ("smollm2-135m", "rome", "simie")
    assert config.policy_settings == {"lam": 1e4, "start": "base", "solver": "cholesky"}
    assert config.method_settings["layer"] == 5
    with pytest.raises(EditError, match="base_hparams"):
        SimIEHyperParams(lamHyper=1).run_config()


def test_a_checkpoint_says_what_it_was_trained_with(tmp_path: Path) -> None:
    hparams = MENDHyperParams(archive=str(tmp_path), rank=7, lr=1.0, max_iters=3)
    assert settings_of(hparams) == {"checkpoint": str(tmp_path)}
    assert {"rank", "lr"} <= hparams.ignored.keys()
    (tmp_path / "llama").write_bytes(b"\x80\x04")
    with pytest.raises(EditError, match="a pickle, and is not read"):
        MENDHyperParams(archive=str(tmp_path / "llama")).run_config()


def test_a_trainings_loop(tmp_path: Path) -> None:
    hparams = MENDTrainingHparams(
        alg="MEND", model_name="smollm2-135m", archive=None, rank=64, max_iters=40, accumulate_bs=10, val_interval=20,
        val_steps=7, early_stop_patience=30, early_stop_key="edit/acc_val", grad_clip=100.0, seed=42, batch_size=2,
        inner_params=["model.layers.29.mlp.up_proj.weight"], opt="Adam", train_base=False,
    )  # fmt: skip
    config = hparams.train_config(tmp_path / "train.jsonl", tmp_path / "val.jsonl")
    loop = config.model_dump(include={"steps", "accumulation", "check_every", "held_out", "patience", "clip", "batch"})
    assert loop == {"steps": 40, "accumulation": 10, "check_every": 20, "held_out": 7, "patience": 30, "clip": 100.0,
                    "batch": 2}  # fmt: skip
    assert (config.method, config.seed, config.method_settings) == ("mend", 42, {"rank": 64, "layers": [29]})
    hparams.model_name = (object(), object())
    with pytest.raises(EditError, match="loads its model itself"):
        hparams.train_config(tmp_path, None)


# --------------------------------------------------------------------------- bad input


def test_a_file_that_is_not_there_names_those_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "gpt2-xl.yaml", ROME)
    for name in ("gpt2", "gpt2.yaml", "none/gpt2"):
        with pytest.raises(EditError, match="no such file") as error:
            ROMEHyperParams.from_hparams(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert ("gpt2-xl.yaml" in str(error.value)) == ("none" not in name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", "v_lr: [1, 2", "cannot be read"),
        ("a.yaml", "- v_lr", "mapping of names"),
        ("a.yaml", "", "mapping of names"),
        ("a.yaml", "1: 2", "mapping of names"),
        ("a.json", '{"v_lr": 1,}', "cannot be read"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.yaml", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_parsed(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EditError, match=said) as error:
        ROMEHyperParams.from_hparams(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_another_algorithms_file(tmp_path: Path) -> None:
    file = write(tmp_path / "memit.yaml", {"alg_name": "MEMIT", "layers": [4, 5]})
    with pytest.raises(EditError, match=r"MEMITHyperParams\.from_hparams"):
        ROMEHyperParams.from_hparams(file)
    assert settings_of(MEMITHyperParams.from_hparams(file)) == {"layers": [4, 5]}
    file = write(tmp_path / "memo.yaml", {"alg_name": "MEMITT"})
    with pytest.raises(UnknownName, match="did you mean MEMIT"):
        ROMEHyperParams.from_hparams(file)
    with pytest.raises(UnknownName, match="alg_name"):
        hparams_class("MELO")
    assert hparams_class("ULTRAEDIT") is UltraEditHyperParams


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (ROMEHyperParams, {"v_lr": "fast"}, "v_lr is 'fast'"),
        (ROMEHyperParams, {"v_num_grad_steps": 2.5}, "a whole number"),
        (ROMEHyperParams, {"layers": [4, 5]}, "a list of one layer"),
        (ROMEHyperParams, {"layers": "five"}, "layers is 'five'"),
        (ROMEHyperParams, {"fact_token": "last"}, "fact_token is 'last'.*subject_last"),
        (ROMEHyperParams, {"mom2_adjustment": "maybe"}, "true or false"),
        (ROMEHyperParams, {"context_template_length_params": [5, 10]}, "pairs of"),
        (ROMEHyperParams, {"model_name": 3}, "model_name is 3"),
        (MEMITHyperParams, {"mom2_adjustment": False}, "mom2_adjustment is False"),
        (FTHyperParams, {"objective_optimization": "all"}, "prompt_last or"),
        (FTHyperParams, {"kl_factor": 0.1}, "kl_factor is 0.1"),
        (WISEHyperParams, {"act_margin": [1, 2]}, "alpha, beta, gamma"),
        (WISEHyperParams, {"merge_freq": 750, "save_freq": 500}, "a multiple of save_freq"),
        (WISEHyperParams, {"merge_alg": "slerp"}, "merge_alg is 'slerp'"),
        (GraceHyperParams, {"inner_params": ["model.norm.weight"]}, "with the layer's number"),
        (GraceHyperParams, {"inner_params": ["h[1].mlp", "h[2].mlp"]}, "one module"),
        (UltraEditHyperParams, {"inner_params": ["model.layers.3.self_attn.q_proj"]}, "projections of an MLP"),
        (UltraEditHyperParams, {"inner_params": "gate_proj"}, "a list of names"),
        (KNHyperParams, {"refine": True}, "refine is True"),
        (R_ROMEHyperParams, {"enable_prompt_keys": True, "enable_random_prefix_keys": True}, "not to both"),
        (MENDHyperParams, {"one_sided": True}, "one_sided is True"),
    ],
)
def test_a_value_that_will_not_do_is_named(kind: type[HyperParams], values: dict[str, Any], said: str) -> None:
    with pytest.raises(EditError, match=said) as error:
        kind(**values).run_config()
    assert kind.__name__ in str(error.value)
    assert isinstance(kind.algorithm.table[next(iter(values))], (Ignored, Mapped))
