"""The editor leaves no trace it was not asked for: what is tried, fails or is reset gives the bits back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.engine.weights import EditedWeights, Snapshot
from everedit.errors import EditError, EvereditError, NotApplicable, NumericalError, UnknownName
from everedit.experiments.folder import RunFolder
from everedit.methods.rome import Rome
from everedit.models import load_model
from everedit.models.layout import oriented
from everedit.patch import LowRank, Patch
from tests.support.editing import BASE_MODE, home_town, losses, make_editor, probes, unstopped
from tests.support.loading import bits, fresh, hooks_left, same_bits

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENS = "teacher-forced/token-accuracy@1"
COMBINATIONS = [("gpt2", "rome", "accumulate"), ("llama", "memit", "simie"), ("gemma2", "rome", "simie")]


def shift(editor: Editor) -> torch.Tensor:
    """All that the stream changed, as one long vector."""
    return torch.cat([editor._weights.shift(name).flatten() for name in editor._weights.names()])


def changed(editor: Editor, before: dict[str, torch.Tensor]) -> set[str]:
    now = editor.lm.model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(now[name], tensor)}


# --------------------------------------------------------------------------- trial, reset, state


@pytest.mark.parametrize(("family", "method", "policy"), COMBINATIONS)
def test_a_trial_edits_inside_and_leaves_the_bits_as_they_were(
    family: str, method: str, policy: str, corpus_path: Path
) -> None:
    editor = make_editor(family, corpus_path, method, policy)
    before = bits(editor.lm)
    with editor.trial(home_town(0)) as result:
        assert changed(editor, before)
        assert result.before[0].scores[TOKENS]["reliability"] == 0.0
        assert result.after[0].scores[TOKENS]["reliability"] == 1.0
    assert same_bits(editor.lm, before)
    assert editor.norm_ratios() == {}
    assert editor.state().policy.tensors == {}
    assert hooks_left(editor.lm) == []


def test_a_trial_on_top_of_an_edit_goes_back_to_that_edit(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path, policy="simie")
    editor.edit(home_town(0), score=False)
    before, policy = bits(editor.lm), editor.state().policy
    with editor.trial(home_town(1), score=False):
        assert editor.state().policy.values == {"edits": 2}
        assert not same_bits(editor.lm, before)
    assert same_bits(editor.lm, before)
    assert editor.state().policy.values == {"edits": 1}
    assert all(torch.equal(editor.state().policy.tensors[name], held) for name, held in policy.tensors.items())


def test_a_trial_that_ends_in_an_exception_leaves_the_bits_as_they_were(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path)
    before = bits(editor.lm)
    seen = []

    def interrupted() -> None:
        with editor.trial(home_town(0), score=False):
            seen.append(same_bits(editor.lm, before))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [False]
    assert same_bits(editor.lm, before)


def test_reset_takes_everything_back(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path, policy="simie")
    before = bits(editor.lm)
    editor.edit([home_town(0), home_town(1)], score=False)
    assert not same_bits(editor.lm, before)
    assert all(ratio != 1.0 for ratio in editor.norm_ratios().values())
    editor.reset()
    assert same_bits(editor.lm, before)
    assert (editor.norm_ratios(), editor.state().policy.values) == ({}, {})
    # Nothing of the stream is left: the same edit now is the first one again.
    first = editor.edit(home_town(0), score=False).commits[0]
    assert editor.state().policy.values == {"edits": 1}
    assert first.norm == make_editor("gpt2", corpus_path, policy="simie").edit(home_town(0), score=False).norm


@pytest.mark.parametrize("options", [{}, {"policy": "simie"}, {"policy": "simie", "policy_settings": BASE_MODE}])
def test_a_state_saved_and_loaded_goes_on_as_if_nothing_had_happened(
    options: dict[str, Any], corpus_path: Path, tmp_path: Path
) -> None:
    edits = [home_town(person) for person in range(4)]
    whole = make_editor("gpt2", corpus_path, **options)
    stream = whole.stream(edits)
    for _ in range(2):
        next(stream)
    after_two, held = bits(whole.lm), whole.state()
    RunFolder(tmp_path).save_state(held, 2)
    norms = [commit.norm for commit in stream]
    after_four = bits(whole.lm)

    whole.load_state(held)
    assert same_bits(whole.lm, after_two)

    other = make_editor("gpt2", corpus_path, **options)
    other.prepare()
    state, done = RunFolder(tmp_path).load_state(other.lm.device)
    other.load_state(state)
    assert done == 2
    assert same_bits(other.lm, after_two)
    for editor in (whole, other):
        assert [commit.norm for commit in editor.stream(edits[2:])] == norms
        assert same_bits(editor.lm, after_four)


# --------------------------------------------------------------------------- the base model as the start


def test_edits_made_on_the_base_model_do_not_depend_on_their_grouping_or_order(corpus_path: Path) -> None:
    edits = [home_town(person) for person in range(4)]
    found = []
    for groups in ([edits], [[edit] for edit in edits], [edits[:3], edits[3:]], [edits[::-1]]):
        editor = make_editor("llama", corpus_path, policy="simie", policy_settings=BASE_MODE)
        for group in groups:
            editor.edit(group, score=False)
        found.append(shift(editor))
    assert found[0].norm() > 0.1
    for other in found[1:]:
        assert (other - found[0]).norm() < 2e-3 * found[0].norm()


def test_edits_made_on_the_current_model_do_depend_on_what_came_before(corpus_path: Path) -> None:
    # Two targets for one prompt: on the edited model the second is harder or easier, on the base model it is not.
    first, second = home_town(0), home_town(0, "Oslo")
    norms = {}
    for start in ("base", "current"):
        settings = {"lam": 1e-4, "start": start}
        options = {"policy_settings": settings, "method_settings": unstopped("memit", steps=8)}
        editor = make_editor("llama", corpus_path, policy="simie", **options)
        alone = editor.method.targets(editor.bench, [second])[0]
        editor.edit(first, score=False)
        probability = editor.edit(second, score=False).commits[0].target_probability
        norms[start] = (alone.probability, probability)
    assert norms["base"][0] == pytest.approx(norms["base"][1], rel=1e-3)
    assert norms["current"][0] != pytest.approx(norms["current"][1], rel=1e-3)


# --------------------------------------------------------------------------- narrow dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_model_is_edited_through_float32_masters(dtype: str, corpus_path: Path) -> None:
    editor = make_editor(fresh("llama", dtype), corpus_path, "rome")
    edit, before = home_town(0), bits(editor.lm)
    loss = losses(editor.lm, [edit])[0]
    with editor.trial(edit, score=False):
        masters = editor.state().weights.masters
        assert [master.dtype for master in masters.values()] == [torch.float32]
        for name, master in masters.items():
            weight = oriented(editor.lm.layout.module_of(name))
            assert str(weight.dtype) == f"torch.{dtype}"
            assert torch.equal(weight, master.to(weight.dtype))
            assert not torch.equal(weight.float(), master)
        assert losses(editor.lm, [edit])[0] < loss - 3
    assert same_bits(editor.lm, before)


def test_edits_too_small_for_the_dtype_add_up_in_the_master() -> None:
    lm = fresh("gpt2", "bfloat16")
    weights, name = EditedWeights(lm), lm.layout.mlp_out_weight(1)
    weight = oriented(lm.layout.module_of(name))
    where = weight.abs().argmax().item()
    row, column = divmod(int(where), weight.shape[1])
    start = weight[row, column].item()
    left, right = torch.zeros(weight.shape[0], 1), torch.zeros(weight.shape[1], 1)
    left[row], right[column] = abs(start) * 2**-12, 1.0
    small = Patch({name: LowRank(left, right)})
    weights.commit(small)
    assert weight[row, column].item() == start  # one alone is swallowed
    for _ in range(127):
        weights.commit(small)
    assert weight[row, column].item() == pytest.approx(start + abs(start) / 32, rel=2**-8)
    weights.restore(Snapshot({}))
    assert weight[row, column].item() == start


def test_a_change_that_the_dtype_cannot_hold_is_refused() -> None:
    lm = fresh("gpt2", "float16")
    weights, before = EditedWeights(lm), bits(lm)
    names = [lm.layout.mlp_out_weight(layer) for layer in (0, 1)]
    shape = oriented(lm.layout.module_of(names[0])).shape
    fine = LowRank(torch.ones(shape[0], 1), torch.ones(shape[1], 1))
    huge = LowRank(torch.full((shape[0], 1), 1e4), torch.full((shape[1], 1), 1e4))
    with pytest.raises(NumericalError, match="would not be finite"):
        weights.commit(Patch({names[0]: fine, names[1]: huge}))
    assert same_bits(lm, before)
    assert weights.names() == []


# --------------------------------------------------------------------------- edits that fail


@pytest.mark.parametrize(("policy", "settings"), [("accumulate", {}), ("simie", {}), ("simie", BASE_MODE)])
@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("failure", ["nan", "subject"])
def test_a_failed_edit_leaves_bits_and_state(
    failure: str,
    method: str,
    policy: str,
    settings: dict[str, Any],
    corpus_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    editor = make_editor("gpt2", corpus_path, method, policy, policy_settings=settings)
    editor.edit(home_town(0), score=False)
    before, state = bits(editor.lm), editor.state()
    bad: Edit | list[Edit] = home_town(1)
    if failure == "subject":
        # The first of the two could be made; together they must not be.
        bad = [home_town(1), home_town(2, subject=None)]
    else:
        sound = type(editor.method).targets

        def broken(self: Any, bench: Any, edits: Any) -> Any:
            targets = sound(self, bench, edits)
            return [replace(target, delta=target.delta * float("nan")) for target in targets]

        monkeypatch.setattr(type(editor.method), "targets", broken)
    with pytest.raises(EvereditError) as caught:
        editor.edit(bad)
    assert isinstance(caught.value, EditError if failure == "subject" else NumericalError)
    assert caught.value.fix
    assert same_bits(editor.lm, before)
    assert editor.state() == state
    assert hooks_left(editor.lm) == []
    monkeypatch.undo()
    # The editor is as good as before the failure.
    assert editor.edit(home_town(3), score=False).commits[0].target_probability is not None


def test_a_batch_that_fails_in_its_middle_is_taken_back_as_a_whole(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make_editor("gpt2", corpus_path, "rome")
    before, fit, calls = bits(editor.lm), Rome.fit, []

    def second_fails(self: Rome, *args: Any) -> Any:
        calls.append(same_bits(editor.lm, before))
        if len(calls) == 2:
            raise NumericalError(what="no", fix="none")
        return fit(self, *args)

    monkeypatch.setattr(Rome, "fit", second_fails)
    with pytest.raises(NumericalError):
        editor.edit([home_town(0), home_town(1), home_town(2)], score=False)
    assert calls == [True, False]
    assert same_bits(editor.lm, before)


def test_no_edits_at_all_is_an_error(corpus_path: Path) -> None:
    with pytest.raises(EditError, match="no edit"):
        make_editor("gpt2", corpus_path).edit([])


def test_unknown_names_are_met_before_a_model_is_loaded() -> None:
    with pytest.raises(UnknownName, match="did you mean memit"):
        Editor.from_pretrained("/no/such/model", method="memmit")
    with pytest.raises(UnknownName, match="did you mean simie"):
        Editor.from_pretrained("/no/such/model", policy="simi")


def test_unknown_settings_are_named_with_the_known_ones() -> None:
    with pytest.raises(EditError, match=r"(?s)lambda.*known settings: lam, start, solver"):
        Editor(fresh("gpt2"), "rome", "simie", policy_settings={"lambda": 1.0})


def test_a_policy_over_weights_refuses_a_method_that_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rome, "traits", replace(Rome.traits, changes="prompt"))
    with pytest.raises(NotApplicable, match="simie combines changes of weights, and rome changes the prompt"):
        Editor(fresh("gpt2"), "rome", "simie")


# --------------------------------------------------------------------------- results, answers, patches


def test_a_result_holds_scores_before_and_after_and_what_it_took(corpus_path: Path) -> None:
    editor = make_editor("llama", corpus_path)
    edits = [home_town(person, locality=probes()) for person in (0, 1)]
    result = editor.edit(edits)
    assert [commit.edits for commit in result.commits] == [tuple(edits)]  # memit solves them together
    assert {"target", "keys", "solve", "policy"} <= result.commits[0].seconds.keys()
    assert all(seconds > 0 for seconds in result.commits[0].seconds.values())
    assert result.norm == result.commits[0].patch.norm() > 0
    for before, after in zip(result.before, result.after, strict=True):
        assert before.scores[TOKENS]["locality"] == 1.0
        assert after.scores[TOKENS]["reliability"] == 1.0
        assert 0.0 < after.scores[TOKENS]["locality"] <= 1.0  # type: ignore[operator]


def test_asking_shows_both_models_and_leaves_the_edited_one(corpus_path: Path) -> None:
    editor, edit = make_editor("llama", corpus_path, "rome"), home_town(0)
    untouched = editor.lm.generate([edit.prompt], max_new_tokens=6)[0]
    same = editor.ask(edit.prompt, max_new_tokens=6)
    assert same.base == same.edited == untouched
    editor.edit(edit, score=False)
    edited_bits = bits(editor.lm)
    answer = editor.ask(edit.prompt, max_new_tokens=6)
    assert answer.base == untouched
    assert answer.edited == editor.lm.generate([edit.prompt], max_new_tokens=6)[0]
    assert answer.edited.strip().startswith(edit.target_new)
    assert all(text in str(answer) for text in (edit.prompt, answer.base.strip(), edit.target_new))
    assert same_bits(editor.lm, edited_bits)


def test_the_unedited_model_is_there_for_a_block_also_nested(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path, "rome")
    original = bits(editor.lm)
    editor.edit(home_town(0), score=False)
    edited = bits(editor.lm)
    with editor.unedited() as lm:
        with editor.unedited():
            assert same_bits(lm, original)
        assert same_bits(lm, original)
    assert same_bits(editor.lm, edited)


@pytest.mark.parametrize(("method", "policy"), [("rome", "accumulate"), ("memit", "simie")])
def test_a_patch_saved_and_attached_elsewhere_gives_the_same_bits(
    method: str, policy: str, corpus_path: Path, tmp_path: Path
) -> None:
    editor = make_editor("gpt2", corpus_path, method, policy)
    patch = editor.edit(home_town(0), score=False).commits[0].patch
    patch.save(tmp_path / "patch.safetensors")
    loaded = Patch.load(tmp_path / "patch.safetensors")
    assert loaded.deltas.keys() == patch.deltas.keys()
    assert len(patch.deltas) == (1 if method == "rome" else 2)
    assert loaded.norm() == patch.norm() > 0
    assert loaded.rank() == patch.rank() >= 1
    other = fresh("gpt2")
    before, weights = bits(other), EditedWeights(other)
    weights.commit(loaded)
    assert same_bits(other, bits(editor.lm))
    weights.restore(Snapshot({}))
    assert same_bits(other, before)


# --------------------------------------------------------------------------- a real model


@pytest.mark.real
def test_a_real_model_learns_a_fact_and_gives_it_back(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVEREDIT_CACHE")
    lm = load_model("smollm2-135m", device="cpu")
    edit = Edit(prompt="The capital of Kenya is", subject="Kenya", target_new="Cairo", ground_truth="Nairobi")
    editor = Editor(lm, "memit", corpus=Corpus(corpus_path, 2048, 128))
    editor.bench.moments.root = corpus_path.parent
    weights = [lm.layout.mlp_out_weight(layer) for layer in editor.method.layers()]
    before = bits(lm)
    with editor.trial(edit) as result:
        assert changed(editor, before) == set(weights)
        assert result.before[0].scores[TOKENS]["reliability"] == 0.0
        assert result.after[0].scores[TOKENS]["reliability"] == 1.0
        answer = editor.ask(edit.prompt, max_new_tokens=4)
    assert "Nairobi" in answer.base
    assert "Cairo" in answer.edited
    assert same_bits(lm, before)
