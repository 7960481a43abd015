"""The experiment scripts of SimIE, PRUNE and WilKE as commands of ours: their flags in, the words of a command out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everedit.compat.classes import hparams_class
from everedit.compat.hparams import SUFFIXES
from everedit.compat.rules import Algorithm
from everedit.compat.tables import algorithm_called
from everedit.data import load_edits
from everedit.errors import EditError, near_names
from everedit.experiments.config import RunConfig
from everedit.models.packaged import ALIASES

__all__ = ["Command", "prune", "run_words", "simie", "wilke"]

_TOKENS, _COMPARISON = "teacher-forced/token-accuracy@1", "probability-comparison@1"

# Data type: our data set, the file that is edited, the file that unrelated texts come from, and the checkpoints.
_ROUNDS = (1, 10, 50, 100, 300, 500, 750, 1000)
_SIMIE_DATA: Mapping[str, tuple[str, str, str, tuple[int, ...]]] = {
    "ZsRE": ("zsre", "zsre_mend_edit.json", "zsre_mend_train.json", _ROUNDS),
    "counterfact": ("counterfact", "counterfact-edit.json", "counterfact-train.json", _ROUNDS),
    "hallucination": (
        "hallucination", "hallucination-edit.json", "hallucination-train.json",
        (1, 10, 50, 100, 200, 300, 400, 500, 600),
    ),
}  # fmt: skip
# That code reads both in the form of ROME's CounterFact.
_PRUNE_DATA: Mapping[str, str] = {"cf": "counterfact.json", "zsre": "BAKE_zsre.json"}
_SAVED_AT = (
    5, 10, 20, 30, 40, 50, 60, 80, 100, 120, 150, 180, 200, 250, 300, 400, 500, 700, 900, 1000, 1200, 1300, 1500, 1600,
    1800, 2000,
)  # fmt: skip
_REDUCTIONS = ("linear", "log", "log2", "log1_5", "log1_2")


@dataclass(frozen=True)
class Command:
    """A command of ours, as words, and what it does otherwise than the script."""

    words: list[str]
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The command as it is typed."""
        return shlex.join(self.words)


def simie(
    *,
    editing_method: str,
    model_name: str,
    data_type: str,
    ds_size: int,
    simIE: bool = False,
    lamHyper: float = 1.0,
    init_model: bool = False,
    solver: str = "LU",
    data_dir: Path = Path("data"),
    hparams_dir: Path = Path("hparams"),
    output_dir: Path = Path("outputs"),
    model: str | None = None,
    settings: Sequence[str] = (),
) -> Command:
    """Return SimIE's ``main_lifelong.py`` as ``everedit run``.

    Raises :class:`everedit.errors.EvereditError` that names the flag which will not do.
    """
    if data_type not in _SIMIE_DATA:
        raise near_names("--data_type", data_type, list(_SIMIE_DATA))
    # In that code PRUNE is a method, on top of ROME.
    pruned = editing_method.casefold() == "prune"
    known = algorithm_called("ROME" if pruned else editing_method, "--editing_method")
    config = _base(known, hparams_dir, model_name, "--model_name", model)
    data, edited, unrelated, marks = _SIMIE_DATA[data_type]
    values: dict[str, Any] = {"policy": "accumulate"}
    if simIE:
        policy = hparams_class("SimIE")(lamHyper=lamHyper, init_model=init_model, solver=solver).translation()
        values = {"policy": "simie", "policy_settings": policy.under("policy")}
    elif pruned:
        function = "log2" if "mistral" in model_name.casefold() else "log1_2"
        values = {"policy": "prune", "policy_settings": {"function": function}}
    if config.method == "wise":
        pool = {"irrelevant": data, "irrelevant_path": str(data_dir / data_type / unrelated)}
        values["method_settings"] = {**config.method_settings, **pool}
    values |= {"data": data, "data_path": data_dir / data_type / edited, "edits": ds_size, "protocols": (_TOKENS,)}
    values |= {"checkpoints": [mark for mark in marks if mark < ds_size], **_KEEP_ALL}
    name = f"{Path(model_name).name}_{editing_method}_N={ds_size}_Sequential=True_{simIE}_{lamHyper}_{init_model}"
    notes = ["a run scores tokens, and no perplexity"] if data_type == "hallucination" else []
    notes += ["locality is measured against the unedited model, and PRUNE is read out, not edited on"] if pruned else []
    return Command(run_words(_changed(config, values), output_dir / name, settings), tuple(notes))


def prune(
    step: str,
    *,
    alg_name: str,
    model_name: str,
    ds_name: str = "cf",
    dataset_size: int | None = None,
    seq_num: int = 100,
    reduce_type: str | None = None,
    dir_name: str | None = None,
    data_dir: Path = Path("data"),
    hparams_dir: Path = Path("hparams"),
    model: str | None = None,
    settings: Sequence[str] = (),
) -> Command:
    """Return a step of PRUNE's code, ``save``, ``load`` or ``summarize``, as ``everedit run`` or ``everedit report``.

    Raises :class:`everedit.errors.EvereditError` that names the flag which will not do.
    """
    if step not in ("save", "load", "summarize"):
        raise near_names("step", step, ["save", "load", "summarize"])
    if step == "summarize":
        if dir_name is None:
            raise EditError(what="--dir_name is missing", fix="give the folder below results/ that load wrote to")
        return Command(["everedit", "report", str(Path("results") / dir_name)])
    if ds_name not in _PRUNE_DATA:
        raise near_names("--ds_name", ds_name, list(_PRUNE_DATA))
    if reduce_type is not None and reduce_type not in _REDUCTIONS:
        raise near_names("--reduce_type", reduce_type, list(_REDUCTIONS))
    file = data_dir / _PRUNE_DATA[ds_name]
    values: dict[str, Any] = {"data": "counterfact_full", "data_path": file, "protocols": (_COMPARISON,), **_KEEP_ALL}
    folder = Path("results") / ds_name
    notes = ["general ability is not measured: everedit run edits and scores edits"]
    if step == "save":
        edits = dataset_size or len(load_edits("counterfact_full", file, keep_contradictions=True).edits)
        values |= {"edits": edits, "checkpoints": [mark for mark in _SAVED_AT if mark < edits]}
        folder = folder / f"{dir_name or alg_name}_save" / model_name
        notes = ["the stream's weights are kept after every edit, in state.safetensors"]
    else:
        values |= {"edits": min(seq_num, dataset_size or seq_num), "checkpoints": []}
        if reduce_type is not None:
            values |= {"policy": "prune", "policy_settings": {"function": reduce_type}}
            folder /= f"reduce_{reduce_type}"
        folder = folder / f"{dir_name or alg_name}_{seq_num}" / model_name
        notes.append("the edits are made again: nothing is loaded, and PRUNE is read out from their sum")
    known = algorithm_called(alg_name, "--alg_name")
    config = _base(known, hparams_dir, model_name, "--model_name", model)
    return Command(run_words(_changed(config, values), folder, settings), tuple(notes))


def wilke(
    *,
    alg_name: str,
    model_name: str,
    hparams_fname: str,
    ds_name: str = "counterfact",
    dataset_size_limit: int = 2048,
    edit_times: int = 1024,
    data_dir: Path = Path("data"),
    hparams_dir: Path = Path("hparams"),
    model: str | None = None,
    settings: Sequence[str] = (),
) -> Command:
    """Return WilKE's ``experiments.evaluate``, which edits facts and edits them back, as ``everedit rollback``.

    Raises :class:`everedit.errors.EvereditError` that names the flag which will not do.
    """
    if ds_name != "counterfact":
        raise near_names("--ds_name", ds_name, ["counterfact"])
    if edit_times > dataset_size_limit:
        raise EditError(
            what=f"--edit_times is {edit_times} and --dataset_size_limit {dataset_size_limit}",
            where="--edit_times",
            fix="ask for no more edits than there are records",
        )
    known = algorithm_called(alg_name, "--alg_name")
    config = _base(known, hparams_dir, hparams_fname, "--hparams_fname", model or _hub_id(model_name))
    marks = [2**power for power in range(edit_times.bit_length())] + list(range(50, 1001, 50))
    # There half of the records are edited, as far as it goes, and the other half is only asked for.
    untouched = min(dataset_size_limit // 2, dataset_size_limit - edit_times)
    words = ["everedit", "rollback", "--model", config.model, "--method", config.method, "--data", "counterfact_full"]
    words += ["--data-path", str(data_dir / f"counterfact_{model_name.replace('/', '_')}_known.json")]
    words += ["--edits", str(edit_times), "--untouched", str(untouched)]
    words += ["--checkpoints", ",".join(str(mark) for mark in sorted(set(marks)) if mark < edit_times) or "1"]
    words += ["--out", str(Path("results") / alg_name / Path(model_name).name)]
    chosen = [*_flat("method", config.method_settings), "contradictions=keep", *settings]
    notes = ("the first facts of the file that the model knows are taken, in its order, and as many as asked for",)
    return Command([*words, *(word for setting in chosen for word in ("--set", setting))], notes)


_KEEP_ALL: Mapping[str, str] = {"known": "keep", "contradictions": "keep"}
"""These scripts edit every record of a file, whatever the model says already and whatever contradicts another."""


def run_words(config: RunConfig, out: Path, settings: Sequence[str] = ()) -> list[str]:
    """Return the words of the ``everedit run`` that has this config, with further ``settings``."""
    words = ["everedit", "run", "--model", config.model, "--method", config.method, "--policy", config.policy]
    words += ["--data", config.data]
    words += [] if config.data_path is None else ["--data-path", str(config.data_path)]
    words += ["--edits", str(config.edits), "--checkpoints", ",".join(map(str, config.checkpoints)), "--out", str(out)]
    rest = config.model_dump(mode="json", include={"batch", "seed", "device", "dtype", "known", "contradictions"})
    usual = RunConfig.model_validate({}).model_dump(mode="json")
    chosen = _flat("method", config.method_settings) + _flat("policy", config.policy_settings)
    chosen += _flat("stats", config.stats.model_dump(mode="json", exclude_defaults=True))
    chosen += [f"{key}={_yaml(value)}" for key, value in rest.items() if value != usual[key]]
    if list(config.protocols) != usual["protocols"]:
        chosen.append(f"protocols={_yaml(list(config.protocols))}")
    return [*words, *(word for setting in (*chosen, *settings) for word in ("--set", setting))]


def _flat(head: str, values: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        place = f"{head}.{key}"
        found += _flat(place, value) if isinstance(value, Mapping) else [f"{place}={_yaml(value)}"]
    return found


def _yaml(value: Any) -> str:
    # JSON is YAML; a text needs no quotes unless it looks like something else.
    return value if isinstance(value, str) and value not in ("", "true", "false", "null") else json.dumps(value)


def _base(known: Algorithm, hparams_dir: Path, name: str, flag: str, model: str | None) -> RunConfig:
    """Return what a script's file of hyper-parameters says, or the method's own settings if ``name`` is a model."""
    file, kind = hparams_dir / known.name / name, hparams_class(known.name)
    if any(file.with_name(file.name + suffix).is_file() for suffix in ("", *SUFFIXES)):
        hparams = kind.from_hparams(file)
    elif name in ALIASES or name.count("/") == 1 or Path(name).is_dir():
        hparams = kind(model_name=name)
    else:
        raise EditError(
            what=f"there is no file of hyper-parameters for {flag} {name}",
            where=str(file),
            fix=f"run this where {hparams_dir}/ is, give --hparams_dir, or name a model: alias, folder or hub id",
        )
    if model is not None:
        hparams.model_name = model
    return hparams.run_config()


def _changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    return RunConfig.model_validate({**config.model_dump(exclude={"checkpoints"}), **values})


def _hub_id(name: str) -> str:
    """Return the hub's present id of the models that were once called by a bare name."""
    return f"openai-community/{name}" if name.startswith("gpt2") and not Path(name).is_dir() else name
