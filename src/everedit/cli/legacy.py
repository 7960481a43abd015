"""``everedit legacy``: the scripts of SimIE, PRUNE and WilKE by their own flags, and what a file of theirs means."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from everedit.cli.console import friendly, say, show_json, show_table

if TYPE_CHECKING:
    from everedit.compat.scripts import Command

app = typer.Typer(help="Scripts of SimIE, PRUNE and WilKE, and EasyEdit's files.", no_args_is_help=True)

_MODEL = typer.Option(None, "--model", help="The model to load, instead of the one that the file names.")
_HPARAMS = typer.Option(Path("hparams"), "--hparams_dir", help="The folder of the files of hyper-parameters.")
_DATA = typer.Option(Path("data"), "--data_dir", help="The folder of the data.")
_SETTINGS = typer.Option([], "--set", help="Settings of ours that win, as in everedit run.")
_SHOW = typer.Option(False, "--show", help="Show the command and stop.")


@app.command("simie")
@friendly
def simie(
    editing_method: str = typer.Option("ROME", "--editing_method", help="FT, ROME, MEMIT, AlphaEdit, …, or PRUNE."),
    model_name: str = typer.Option("llama-7b", "--model_name", help="A file in hparams/METHOD, or a model."),
    data_type: str = typer.Option("ZsRE", "--data_type", help="ZsRE, counterfact or hallucination."),
    ds_size: int = typer.Option(1000, "--ds_size", min=1, help="How many edits."),
    simIE: bool = typer.Option(False, "--simIE", help="Under SimIE."),
    lamHyper: float = typer.Option(1.0, "--lamHyper", help="Its lambda."),
    init_model: bool = typer.Option(False, "--init_model", help="Each edit from the unedited model."),
    solver: str = typer.Option("LU", "--solver", help="LU, Cholesky or SVD."),
    output_dir: Path = typer.Option(Path("outputs"), "--output_dir", help="Where the run's folder is made."),
    sequential_edit: bool = typer.Option(True, "--sequential_edit", help="Edits stay, as they always do in a run."),
    save_model: bool = typer.Option(False, "--save_model", help="A run always keeps its state."),
    data_dir: Path = _DATA,
    hparams_dir: Path = _HPARAMS,
    model: str | None = _MODEL,
    setting: list[str] = _SETTINGS,
    show: bool = _SHOW,
) -> None:
    """Run SimIE's main_lifelong.py as everedit run."""
    from everedit.compat import scripts

    command = partial(
        scripts.simie, editing_method=editing_method, model_name=model_name, data_type=data_type, ds_size=ds_size,
        simIE=simIE, lamHyper=lamHyper, init_model=init_model, solver=solver, data_dir=data_dir,
        hparams_dir=hparams_dir, output_dir=output_dir, model=model, settings=setting,
    )  # fmt: skip
    _do(command, show)


@app.command("prune")
@friendly
def prune(
    step: str = typer.Argument("load", help="save, load or summarize: edit_save.py, edit_load.py, summarize."),
    alg_name: str = typer.Option("ROME", "--alg_name", help="ROME, MEMIT, MEND, …"),
    model_name: str = typer.Option("gpt2-xl", "--model_name", help="A file in hparams/ALG, or a model."),
    ds_name: str = typer.Option("cf", "--ds_name", help="cf or zsre."),
    dataset_size: int | None = typer.Option(
        None, "--dataset_size", "--dataset_size_limit", min=1, help="How many records; all by default."
    ),
    seq_num: int = typer.Option(100, "--seq_num", min=1, help="After how many edits the model is evaluated."),
    reduce_type: str | None = typer.Option(None, "--reduce_type", help="linear, log, log2, log1_5 or log1_2."),
    dir_name: str | None = typer.Option(None, "--dir_name", help="Name of the folder below results/."),
    cuda: int = typer.Option(0, "--cuda", help="Not read: the best device at hand is used."),
    data_dir: Path = _DATA,
    hparams_dir: Path = _HPARAMS,
    model: str | None = _MODEL,
    setting: list[str] = _SETTINGS,
    show: bool = _SHOW,
) -> None:
    """Run a step of PRUNE's code as everedit run, or summarize it as everedit report."""
    from everedit.compat import scripts

    command = partial(
        scripts.prune, step, alg_name=alg_name, model_name=model_name, ds_name=ds_name, dataset_size=dataset_size,
        seq_num=seq_num, reduce_type=reduce_type, dir_name=dir_name, data_dir=data_dir, hparams_dir=hparams_dir,
        model=model, settings=setting,
    )  # fmt: skip
    _do(command, show)


@app.command("wilke")
@friendly
def wilke(
    alg_name: str = typer.Option("WilKE", "--alg_name", help="WilKE, ROME, MEMIT, MEND, KE or KN."),
    model_name: str = typer.Option("gpt2-xl", "--model_name", help="The model, as the hub calls it."),
    hparams_fname: str = typer.Option("gpt2-xl.json", "--hparams_fname", help="A file in hparams/ALG."),
    ds_name: str = typer.Option("counterfact", "--ds_name", help="counterfact."),
    dataset_size_limit: int = typer.Option(2048, "--dataset_size_limit", min=1, help="How many known facts."),
    edit_times: int = typer.Option(1024, "--edit_times", min=1, help="How many are edited and edited back."),
    skip_generation_tests: bool = typer.Option(False, "--skip_generation_tests", help="There are none here."),
    conserve_memory: bool = typer.Option(False, "--conserve_memory", help="Not read."),
    data_dir: Path = _DATA,
    hparams_dir: Path = _HPARAMS,
    model: str | None = _MODEL,
    setting: list[str] = _SETTINGS,
    show: bool = _SHOW,
) -> None:
    """Run WilKE's evaluation, which edits facts and edits them back, as everedit rollback."""
    from everedit.compat import scripts

    command = partial(
        scripts.wilke, alg_name=alg_name, model_name=model_name, hparams_fname=hparams_fname, ds_name=ds_name,
        dataset_size_limit=dataset_size_limit, edit_times=edit_times, data_dir=data_dir, hparams_dir=hparams_dir,
        model=model, settings=setting,
    )  # fmt: skip
    _do(command, show)


@app.command("hparams")
@friendly
def hparams(
    file: Path = typer.Argument(help="A YAML or JSON file of EasyEdit's, ROME's, MEMIT's or WilKE's."),
    alg_name: str | None = typer.Option(None, "--alg_name", help="The algorithm, where the file names none."),
    json: bool = typer.Option(False, "--json", help="Write JSON."),
) -> None:
    """Show what a file of hyper-parameters means here, and which of its keys change nothing, and why."""
    from everedit.compat.classes import hparams_class
    from everedit.compat.hparams import read_file
    from everedit.errors import EditError

    path, values = read_file(file)
    named = alg_name or values.get("alg_name", values.get("alg"))
    if named is None:
        raise EditError(what="the file names no algorithm", where=str(path), fix="give --alg_name")
    with _heard():
        meaning = hparams_class(str(named)).from_hparams(path).translation()
    if json:
        show_json({"method": meaning.method, "settings": meaning.settings, "ignored": meaning.ignored})
        return
    rows = [(place, str(value)) for place, value in meaning.settings.items() if place != "algorithm"]
    show_table(f"{path.name}: method {meaning.method}", ("setting", "value"), rows)
    show_table("Keys that change nothing", ("key", "why"), meaning.ignored.items())


@contextmanager
def _heard() -> Iterator[None]:
    """Show what files are warned of in the block, such as unknown keys."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    for warning in heard:
        say(f"warning: {warning.message}", aside=True)


def _do(made: Callable[[], Command], show: bool) -> None:
    """Show a command of ours, then run it as it stands there."""
    with _heard():
        command = made()
    for note in command.notes:
        say(f"note: {note}", aside=True)
    say(command.line)
    if show:
        return
    from everedit.cli.main import app as everything

    code = typer.main.get_command(everything).main(command.words[1:], standalone_mode=False)
    if code:
        raise typer.Exit(int(code))
