"""EasyEdit's arguments and metrics: our scorers in its nesting, texts from elsewhere, and bad input by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit import Editor
from everedit.compat import classes, easyedit
from everedit.compat.easyedit import (
    BaseEditor,
    CompatibilityWarning,
    CounterFactDataset,
    HyperParams,
    MEMITHyperParams,
    ROMEHyperParams,
    ZsreDataset,
    summary_metrics,
)
from everedit.edit import Edit
from everedit.errors import EditError, EvereditError, ModelError, UnknownName
from everedit.evaluation.read import read
from tests.support.easyedit import EDITS, SCRIPTS, SPREAD, TEXTS, hparams_of, memory_bits
from tests.support.editing import probes
from tests.support.loading import bits, fresh, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def rome(corpus_path: Path, tmp_path: Path) -> BaseEditor:
    return BaseEditor.from_hparams(hparams_of("ROME", SCRIPTS["ROME"][0], corpus_path, tmp_path))


# --------------------------------------------------------------------------- metrics


def full(index: int) -> dict[str, Any]:
    """EasyEdit's arguments for the first edits, with a locality key of two prompts and one that is missing once."""
    [one, other] = probes()
    return {
        **TEXTS,
        "rephrase_prompts": [f"Yes. {prompt}" for prompt in TEXTS["prompts"]],
        "locality_inputs": {
            "neighborhood": {"prompt": [one.prompt, other.prompt], "ground_truth": [one.answer, other.answer]},
            "distracting": {
                "prompt": [[one.prompt, other.prompt], None],
                "ground_truth": [[one.answer, other.answer], None],
            },
        },
        "portability_inputs": {
            "one_hop": {"prompt": [other.prompt, one.prompt], "ground_truth": [[other.answer, "x"], one.answer]}
        },
        "ground_truth": ["Cairo", "Lima"],
    }


def test_the_nested_metrics_are_our_scorers(rome: BaseEditor) -> None:
    metrics, _, _ = rome.edit(**full(0), sequential_edit=True)
    row = metrics[0]
    assert {"pre", "post", "final", "case_id", "requested_rewrite", "time"} == row.keys()
    assert row["post"]["rewrite_acc"] == [1.0]
    assert row["pre"]["rewrite_acc"][0] < 1
    assert row["post"]["locality"].keys() == {
        "neighborhood_acc", "neighborhood_output", "distracting_acc", "distracting_output"
    }  # fmt: skip
    assert len(row["post"]["locality"]["distracting_acc"]) == 2
    assert "distracting_acc" not in metrics[1]["post"]["locality"]
    assert row["pre"]["locality"]["neighborhood_acc"] == [1.0]
    assert row["post"]["portability"].keys() == {"one_hop_acc"}
    # Found a second time: first choices of the edited and of the unedited model, token by token.
    [one, _] = probes()
    pairs = [(one.prompt, one.answer), (f"Yes. {EDITS[0].prompt}", EDITS[0].target_new)]
    base, final = read(shared("gpt2"), pairs), read(rome.lm, pairs)
    assert row["final"]["locality"]["neighborhood_output"] == [list(final[0].predicted)]
    same = [a == b for a, b in zip(final[0].predicted, base[0].predicted, strict=True)]
    assert row["final"]["locality"]["neighborhood_acc"] == [sum(same) / len(same)]
    right = [a == b for a, b in zip(final[1].predicted, final[1].target, strict=True)]
    assert row["final"]["rephrase_acc"] == [sum(right) / len(right)]
    json.dumps(metrics)


def test_every_metric_names_its_protocol(rome: BaseEditor) -> None:
    metrics, _, _ = rome.edit(**full(0), sequential_edit=True)
    told = metrics[0]["post"]["metric_meta"]
    assert told.keys() == {
        "rewrite", "rephrase", "locality.neighborhood", "locality.distracting", "portability.one_hop"
    }  # fmt: skip
    assert {about["protocol"] for about in told.values()} == {"teacher-forced/token-accuracy@1"}
    assert told["rewrite"]["result_key"] == "rewrite_acc"
    assert told["locality.neighborhood"]["against"] == "unedited model"
    scored = [metrics[0][phase]["metric_meta"]["rewrite"]["scored"] for phase in ("pre", "post", "final")]
    assert scored == ["before the edits", "right after the edit", "after all edits"]


def test_locality_is_measured_against_the_unedited_model_in_later_calls(rome: BaseEditor) -> None:
    [one, _] = probes()
    inputs = {"n": {"prompt": [one.prompt], "ground_truth": [one.answer]}}
    rome.edit(**TEXTS, sequential_edit=True)
    first = {name: texts[:1] for name, texts in TEXTS.items()}
    metrics, _, _ = rome.edit(**first, locality_inputs=inputs, sequential_edit=True)
    base = read(shared("gpt2"), [(one.prompt, one.answer)])[0].predicted
    for phase in ("pre", "final"):
        [said] = metrics[0][phase]["locality"]["n_output"]
        wanted = sum(a == b for a, b in zip(said, base, strict=True)) / len(base)
        assert metrics[0][phase]["locality"]["n_acc"] == [wanted]


def test_other_protocols_by_eval_metric(rome: BaseEditor) -> None:
    arguments = full(0)
    accuracy = rome.edit(**arguments)[0]
    for name in ("token em", "teacher-forced/token-accuracy@1"):
        assert rome.edit(**arguments, eval_metric=name)[0][0]["post"] == accuracy[0]["post"]
    written = rome.edit(**arguments, eval_metric="free-generation/exact-match@1")[0][0]["post"]
    assert written["metric_meta"]["rewrite"]["protocol"] == "free-generation/exact-match@1"
    assert isinstance(written["locality"]["neighborhood_gen_content"][0], str)
    perplexity = rome.edit(**arguments, eval_metric="ppl")[0][1]["post"]
    loss = read(rome.lm, [(EDITS[1].prompt, EDITS[1].target_new)])[0].nll
    assert perplexity["rewrite_ppl"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert perplexity["metric_meta"]["rewrite"]["protocol"] == "teacher-forced/perplexity@1"
    assert perplexity["metric_meta"]["locality.neighborhood"]["protocol"] == "teacher-forced/token-accuracy@1"
    rome.hparams.evaluation_type = "LLM-judge"
    judged = rome.edit(**arguments)[0][0]["post"]
    assert judged["metric_meta"]["rewrite"]["protocol"] == "free-generation/exact-match@1"
    with pytest.raises(UnknownName, match=r"eval_metric 'token_me'.*\n.*token_em"):
        rome.edit(**arguments, eval_metric="token_me")


def test_the_summary_is_the_mean_over_edits(rome: BaseEditor) -> None:
    metrics, _, _ = rome.edit(**full(0), sequential_edit=True)
    means = summary_metrics(metrics)
    both = [row["post"]["rephrase_acc"][0] for row in metrics]
    assert means["post"]["rephrase_acc"] == sum(both) / 2
    # Each edit counts once, and one without the key not at all.
    distracting = metrics[0]["post"]["locality"]["distracting_acc"]
    assert means["post"]["locality"]["distracting_acc"] == sum(distracting) / 2
    assert means.keys() == {"pre", "post", "final"}
    assert summary_metrics(metrics[0])["pre"]["rewrite_acc"] == metrics[0]["pre"]["rewrite_acc"][0]


# --------------------------------------------------------------------------- texts from elsewhere


def test_wise_takes_its_unrelated_texts_from_loc_prompts(corpus_path: Path, tmp_path: Path) -> None:
    values = SCRIPTS["WISE"][0]
    texts = ["nq question: who sings the song we had at noon Mira Quell", "the harbour was quiet all evening"]
    editor = BaseEditor.from_hparams(hparams_of("WISE", values, corpus_path, tmp_path))
    editor.edit(**TEXTS, loc_prompts=texts, sequential_edit=True)
    pool = [{"prompt": text.rpartition(" ")[0], "target_new": text.rpartition(" ")[2]} for text in texts]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, pool)), encoding="utf-8")
    settings = {**SCRIPTS["WISE"][2], "irrelevant": str(tmp_path / "pool.jsonl")}
    ours = Editor(fresh("gpt2"), "wise", method_settings=settings)
    for edit in EDITS:
        ours.edit(edit, score=False)
    mine, theirs = memory_bits(ours), memory_bits(editor.editor)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = BaseEditor.from_hparams(hparams_of("WISE", values, corpus_path, tmp_path))
    other.edit(**TEXTS, sequential_edit=True)
    assert not torch.equal(memory_bits(other.editor)["done"], theirs["done"])


def test_ike_takes_its_demonstrations_from_train_ds(corpus_path: Path, tmp_path: Path) -> None:
    editor = BaseEditor.from_hparams(hparams_of("IKE", {"k": 2}, corpus_path, tmp_path))
    records = [
        {"prompt": f"The home town of {name} is", "target_new": place, "subject": name}
        for name, place in (("Ada Nyman", "Turku"), ("Ilse Bakker", "Gouda"), ("Rui Prata", "Faro"))
    ]
    editor.edit(**TEXTS, train_ds=records, sequential_edit=True)
    [speaker] = editor.lm.speakers(["The home town of Mira Lanner is"], [4])
    assert speaker.prompt.startswith("New Fact: The home town of")
    # As many as the tiny model's context has room for.
    assert any(record["prompt"] in speaker.prompt for record in records)
    assert "New Fact: The home town of Mira Lanner" in speaker.prompt


def test_data_sets_are_sequences_of_records(tmp_path: Path, rome: BaseEditor) -> None:
    zsre = [
        {"subject": "Mira Lanner", "src": "The home town of Mira Lanner", "alt": "Oslo", "answers": ["Cairo"],
         "rephrase": "Yes. The home town of Mira Lanner", "loc": "nq question: who sings", "loc_ans": "Corin"},
        {"src": "no answer", "alt": ""},
        {"subject": "Sabine Ingelby", "src": "The home town of Sabine Ingelby", "alt": "Kyoto", "answers": ["Lima"]},
    ]  # fmt: skip
    (tmp_path / "zsre.json").write_text(json.dumps(zsre), encoding="utf-8")
    dataset = ZsreDataset(str(tmp_path / "zsre.json"), size=2)
    assert (len(dataset), dataset[0]["target_new"], dataset[1]["subject"]) == (2, "Oslo", "Sabine Ingelby")
    assert [record["prompt"] for record in dataset[:1]] == [record["prompt"] for record in dataset][:1]
    assert dataset[0]["cond"] == "Cairo >> Oslo || The home town of Mira Lanner"
    assert dataset[0]["locality_ground_truth"] == "Corin"
    assert len(dataset.rejected) == 1
    reduced = [{"prompt": "a b", "target_new": "c", "locality_prompt": "d e", "locality_ground_truth": "f"}]
    (tmp_path / "cf.json").write_text(json.dumps(reduced), encoding="utf-8")
    assert CounterFactDataset(tmp_path / "cf.json")[0]["locality_prompt"] == "d e"
    metrics, _, _ = rome.edit_dataset(dataset, sequential_edit=True)
    assert [row["requested_rewrite"]["target_new"] for row in metrics] == ["Oslo", "Kyoto"]
    (tmp_path / "none.json").write_text("[]", encoding="utf-8")
    with pytest.raises(EditError, match="no record"):
        ZsreDataset(tmp_path / "none.json")
    with pytest.raises(EditError, match=r"ds\[0\]"):
        rome.edit_dataset(["a text"])


# --------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompts": []}, "prompts"),
    "targets": ({"target_new": ["Oslo"]}, "target_new has 1 entries and prompts has 2"),
    "subjects": ({"subject": [*TEXTS["subject"], "Mira"]}, "subject has 3 entries"),
    "a text for two": ({"rephrase_prompts": "Yes."}, "rephrase_prompts has 1 entries"),
    "true answers": ({"ground_truth": []}, "ground_truth has 0 entries"),
    "locality": ({"locality_inputs": {"n": {"prompt": ["a"], "ground_truth": ["b"]}}}, r"locality_inputs\['n'\]"),
    "locality answers": ({"locality_inputs": {"n": {"prompt": ["a", "b"]}}}, "needs prompt and ground_truth"),
    "uneven probes": (
        {"portability_inputs": {"p": {"prompt": [["a", "b"], "c"], "ground_truth": [["x"], "y"]}}}, "2 prompts and 1"
    ),
    "empty answer": ({"locality_inputs": {"n": {"prompt": ["a", "b"], "ground_truth": ["x", ""]}}}, r"prompts\[1\]"),
    "no subject": ({"subject": None}, "rome needs the subject of every prompt"),
    "one subject missing": ({"subject": [TEXTS["subject"][0], None]}, r"prompts\[1\] has none"),
    "a subject elsewhere": ({"subject": ["Mira Lanner", "Nobody"]}, "does not occur in the prompt"),
    "an empty target": ({"target_new": ["Oslo", ""]}, "target_new"),
    "too many texts": ({"loc_prompts": ["a b", "c d", "e f"]}, "loc_prompts"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_named_and_nothing_is_changed(
    kind: str, rome: BaseEditor, corpus_path: Path, tmp_path: Path
) -> None:
    change, said = BAD[kind]
    editor = rome
    if "loc_prompts" in change:
        editor = BaseEditor.from_hparams(hparams_of("WISE", SCRIPTS["WISE"][0], corpus_path, tmp_path))
    before = bits(editor.lm)
    with pytest.raises(EditError, match=said):
        editor.edit(**{**TEXTS, **change}, sequential_edit=True)
    assert same_bits(editor.lm, before)
    assert memory_bits(editor.editor) == {}


def test_an_edit_that_fails_in_the_middle_takes_the_others_back(
    rome: BaseEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rome.edit(**{name: texts[:1] for name, texts in TEXTS.items()}, sequential_edit=True)
    before, edit, made = bits(rome.lm), rome.editor.edit, []

    def failing(edits: Any, **options: Any) -> Any:
        made.append(edits)
        if len(made) == 2:
            raise EditError(what="it cannot be made")
        return edit(edits, **options)

    monkeypatch.setattr(rome.editor, "edit", failing)
    with pytest.raises(EditError, match="cannot be made"):
        rome.edit(**TEXTS, sequential_edit=True)
    assert same_bits(rome.lm, before)


def test_unknown_arguments_get_a_warning_with_the_near_name(rome: BaseEditor) -> None:
    with pytest.warns(CompatibilityWarning, match="did you mean loc_prompts") as heard:
        rome.edit(**TEXTS, loc_promts=["a b"], verbose=False, test_generation=False, pre_file=None)
    assert [warning.filename for warning in heard] == [__file__]
    with pytest.warns(CompatibilityWarning, match="fluency") as heard:
        rome.edit(**TEXTS, test_generation=True)
    assert [warning.filename for warning in heard] == [__file__]


MODELS: list[tuple[Callable[[], HyperParams], str]] = [
    (partial(ROMEHyperParams, layers=[1]), "name no model"),
    (partial(ROMEHyperParams, model_name="./hugging_cache/gpt2-xl"), "model_name"),
    (partial(ROMEHyperParams, model_name="smollm2-135"), "did you mean smollm2-135m"),
]


@pytest.mark.parametrize(("make", "said"), MODELS)
def test_a_model_that_is_not_there(make: Callable[[], HyperParams], said: str) -> None:
    with pytest.raises((EditError, ModelError, UnknownName), match=said):
        BaseEditor.from_hparams(make())


def test_a_layer_that_is_not_there_changes_nothing(corpus_path: Path, tmp_path: Path) -> None:
    hparams = hparams_of("MEMIT", {**SPREAD, "layers": [3, 4]}, corpus_path, tmp_path)
    assert isinstance(hparams, MEMITHyperParams)
    with pytest.raises(EvereditError, match="no layer 4"):
        BaseEditor.from_hparams(hparams)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(easyedit, name) for name in easyedit.__all__)
    assert {kind.__name__ for kind in classes.CLASSES} <= set(easyedit.__all__)
    assert Edit.__name__ not in easyedit.__all__
