"""The roll-back protocol: scores worked out by hand, a way back at the layer of the way there, updates that flash."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everedit.edit import Edit, Probe
from everedit.editor import Editor, EditResult
from everedit.errors import EditError
from everedit.experiments import rollback as module
from everedit.experiments.rollback import known_facts, rollback, toxicity
from tests.support import facts
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import bits, edit_of, fresh, same_bits, shared
from tests.support.running import full_edit

pytestmark = pytest.mark.usefixtures("own_cache")


def fact(name: str, rephrase: Sequence[str] = (), locality: Sequence[Probe] = ()) -> Edit:
    return Edit(
        prompt=f"{name} is", target_new=f"{name}-new", ground_truth=f"{name}-old",
        rephrase=tuple(rephrase), locality=tuple(locality),
    )  # fmt: skip


NEAR = [Probe(prompt="n1", answer="x"), Probe(prompt="n2", answer="y"), Probe(prompt="n3", answer="z")]
EDITS = [fact("a", ["a1", "a2"], NEAR[:2]), fact("b"), fact("c", ["c1"], NEAR[2:])]
UNTOUCHED = [fact("u"), fact("v")]


class Scripted:
    """An editor without a model: what it says after each update is written down here, every update has a size."""

    def __init__(self, said: dict[int, set[tuple[str, str]]]) -> None:
        self.lm, self.said, self.done = self, said, []
        self.method = SimpleNamespace(going_back=lambda patch: f"back from {patch}")
        self.log: list[str] = []

    def edit(self, edit: Edit, *, score: bool) -> Any:
        assert not score
        self.done.append((edit.prompt, edit.target_new, edit.ground_truth, self.method_in_use()))
        norm = float(len(self.done))
        commit = SimpleNamespace(norm=norm, patch=f"patch {len(self.done)}")
        return SimpleNamespace(commits=[commit], norm=norm)

    def method_in_use(self) -> str:
        return self.method if isinstance(self.method, str) else "its own"

    @contextmanager
    def using(self, method: Any) -> Any:
        mine, self.method = self.method, method
        yield
        self.method = mine

    def read(self, lm: Any, pairs: Sequence[tuple[str, str]]) -> list[SimpleNamespace]:
        assert lm is self
        right = self.said.get(len(self.done), set())
        return [SimpleNamespace(target=(1, 2), predicted=(1, 2) if pair in right else (1, 9)) for pair in pairs]


def scripted(monkeypatch: pytest.MonkeyPatch, said: dict[int, set[tuple[str, str]]]) -> Scripted:
    editor = Scripted(said)
    monkeypatch.setattr(module, "read", editor.read)
    return editor


# Updates 1, 3, 5 edit a, b, c; 2, 4, 6 take them back.
SAID = {
    1: {("a is", "a-new"), ("a2", "a-new"), ("n1", "x"), ("n2", "y")},
    2: {("a is", "a-old"), ("u is", "u-old")},
    3: {("b is", "b-old")},
    4: {("a is", "a-old"), ("b is", "b-old"), ("v is", "v-old"), ("u is", "u-old")},
    5: {("c is", "c-new"), ("c1", "c-new")},
    6: {("b is", "b-old"), ("u is", "u-old"), ("c is", "c-new")},
}


def test_the_scores_are_those_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = scripted(monkeypatch, SAID)
    found = rollback(editor, EDITS, UNTOUCHED, marks=[1, 2])  # type: ignore[arg-type]
    one, two, three = (found["checkpoints"][mark] for mark in "123")
    # S: 5 / (1/1 + 2/1 + 1/1 + 1/1 + 2/1)
    assert one == pytest.approx({"ES": 1, "GS": 0.5, "LS": 1, "ERS": 1, "ORS": 0.5, "S": 5 / 7})
    # b has neither rephrasings nor locality probes: they stay out of the means.
    assert two == pytest.approx({"ES": 0.5, "GS": 0.5, "LS": 1, "ERS": 1, "ORS": 1, "S": 5 / 7})
    # Edit by edit: ES 1, 0, 1; GS 1/2, none, 1; LS 1, none, 0. Of a, b and c only b is as it was; of u and v one.
    row = {"ES": 2 / 3, "GS": 3 / 4, "LS": 1 / 2, "ERS": 1 / 3, "ORS": 1 / 2}
    assert three == pytest.approx({**row, "S": 5 / (3 / 2 + 4 / 3 + 2 + 3 + 2)})


def test_a_zero_counts_as_a_ten_thousandth_and_what_is_not_there_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    editor = scripted(monkeypatch, {1: {("b is", "b-new")}, 2: {("b is", "b-old")}})
    [row] = rollback(editor, EDITS[1:2], UNTOUCHED)["checkpoints"].values()  # type: ignore[arg-type]
    assert (row["ES"], row["GS"], row["LS"], row["ERS"], row["ORS"]) == (1.0, None, None, 1.0, 0.0)
    assert row["S"] == pytest.approx(3 / (1 + 1 + 1e4))
    [alone] = rollback(scripted(monkeypatch, {}), EDITS[1:2], [])["checkpoints"].values()  # type: ignore[arg-type]
    assert alone["ORS"] is None
    assert alone["S"] == pytest.approx(1e-4)


def test_every_edit_is_followed_by_its_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = scripted(monkeypatch, {})
    found = rollback(editor, EDITS, [])  # type: ignore[arg-type]
    expected = []
    for number, name in zip((1, 3, 5), "abc", strict=True):
        expected.append((f"{name} is", f"{name}-new", f"{name}-old", "its own"))
        expected.append((f"{name} is", f"{name}-old", f"{name}-new", f"back from patch {number}"))
    assert editor.done == expected
    assert editor.method_in_use() == "its own"
    assert found["sizes"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("marks", "kept"), [((), ["3"]), ((1, 1, 2), ["1", "2", "3"]), ((0, -1, 3, 9), ["3"]), ((2,), ["2", "3"])]
)
def test_there_is_a_checkpoint_at_each_mark_and_at_the_end(
    marks: tuple[int, ...], kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rollback(scripted(monkeypatch, {}), EDITS, [], marks)  # type: ignore[arg-type]
    assert list(found["checkpoints"]) == kept


@pytest.mark.parametrize("place", [0, 1])
def test_an_edit_without_a_true_answer_is_an_error(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = scripted(monkeypatch, {})
    edits = [*EDITS[:2]]
    edits[place] = Edit(prompt="The home of d is", target_new="Oslo")
    with pytest.raises(EditError, match="without a true answer") as caught:
        rollback(editor, edits, [])  # type: ignore[arg-type]
    assert "The home of d is" in str(caught.value)
    assert "ground_truth" in caught.value.fix
    # Found before anything is edited.
    assert editor.done == []


# --------------------------------------------------------------------------- toxicity


@pytest.mark.parametrize(
    ("sizes", "flashes", "buildup"),
    [
        ([1.0], (), 1.0),
        ([1.0, 1.0, 11.0, 1.0], (3,), 1.0),
        ([1.0, 1.0, 10.0, 1.0], (), 1.0),  # ten times the median is not yet more than that
        ([1.0, 3.0, 21.0, 31.0], (3, 4), 31.0),  # medians before: 1, 2, 3
        ([50.0, 1.0, 1.0, 1.0], (), 0.02),  # the first has nothing before it
        ([1.0, 2.0, 3.0] + [4.0] * 14 + [6.0, 8.0, 10.0], (), 6.0),  # twenty: the median of two against that of two
        ([0.0, 0.0], (), 1.0),
        ([0.0, 1.0], (2,), 1.0),
    ],
)
def test_flashes_and_buildup_of_sizes_made_by_hand(
    sizes: list[float], flashes: tuple[int, ...], buildup: float
) -> None:
    found = toxicity(sizes)
    assert found.flashes == flashes
    assert found.buildup == pytest.approx(buildup)


def test_the_factor_of_a_flash_can_be_given() -> None:
    assert toxicity([1.0, 3.0, 1.0], factor=2.0).flashes == (2,)
    assert toxicity([1.0, 3.0, 1.0], factor=3.0).flashes == ()


def test_flashes_are_those_of_the_streams_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = scripted(monkeypatch, {})
    plain = editor.edit

    def growing(edit: Edit, *, score: bool) -> Any:
        result = plain(edit, score=score)
        if len(editor.done) in (3, 4):
            result.commits[0].norm = result.norm = 100.0 * len(editor.done)
        return result

    monkeypatch.setattr(editor, "edit", growing)
    found = rollback(editor, EDITS, [])  # type: ignore[arg-type]
    assert found["sizes"] == [1, 2, 300, 400, 5, 6]
    assert found["flashes"] == [3, 4]
    assert found["buildup"] == pytest.approx(6.0)


# --------------------------------------------------------------------------- on a tiny model


def test_wilke_goes_back_at_the_layer_that_it_chose(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**METHOD_SETTINGS["wilke"], "layers": (1, 2, 3)}
    editor = make_editor("gpt2", corpus_path, "wilke", method_settings=settings)
    edits, infos, make = [full_edit(person) for person in (0, 4, 12)], [], Editor.edit

    def noting(self: Editor, edit: Any, *, score: bool = True) -> EditResult:
        result = make(self, edit, score=score)
        infos.extend(commit.patch.info for commit in result.commits)
        return result

    monkeypatch.setattr(Editor, "edit", noting)
    before, own = bits(editor.lm), editor.method
    found = rollback(editor, edits, [], marks=[1])
    assert editor.method is own
    assert len(infos) == len(found["sizes"]) == 2 * len(edits)
    for there, back in zip(infos[::2], infos[1::2], strict=True):
        assert set(there["scores"]) == {"1", "2", "3"}
        # Without another search.
        assert set(back["scores"]) == {str(there["layer"])}
        assert back["layer"] == there["layer"]
    # Nothing is undone by copying: the weights have drifted, and the editor keeps them so.
    assert not same_bits(editor.lm, before)
    assert set(found["checkpoints"]) == {"1", "3"}
    assert found["checkpoints"]["3"]["ES"] == 1.0
    assert found["checkpoints"]["3"]["ERS"] > 0


def test_a_tiny_model_is_scored_as_it_answers(corpus_path: Path) -> None:
    """Read again by whole generations: a target is said if greedy decoding goes through it token by token."""
    editor = make_editor("gpt2", corpus_path, "rome")
    edits = [full_edit(person) for person in (0, 8)]
    untouched = [edit_of(f, ground_truth=f.answer) for f in facts.facts()[60:72]]
    found = rollback(editor, edits, untouched)

    def said(prompt: str, answer: str) -> float:
        prompt_ids, whole = (editor.lm.tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {answer}"))
        target = whole[len(prompt_ids) :]
        return float(editor.lm.generate_ids([prompt_ids], max_new_tokens=len(target))[0] == target)

    [row] = found["checkpoints"].values()
    assert row["ERS"] == pytest.approx(sum(said(e.prompt, str(e.ground_truth)) for e in edits) / 2)
    assert row["ORS"] == pytest.approx(sum(said(e.prompt, str(e.ground_truth)) for e in untouched) / len(untouched))
    assert row["ORS"] > 0
    assert row["ES"] == 1.0


def test_known_facts_are_those_that_the_unedited_model_says(corpus_path: Path) -> None:
    editor, known = make_editor(fresh("gpt2"), corpus_path, "rome"), facts.facts()[:6]
    true = [edit_of(f, ground_truth=f.answer) for f in known]
    wrong = [edit_of(f, "Nowhere", ground_truth=facts.counterfactual(f)) for f in known]
    # An answer that only begins as the true one does is not the true one.
    longer = edit_of(known[0], "Nowhere", ground_truth=f"{known[0].answer} piano")
    unknown = home_town(0)
    assert unknown.ground_truth is None
    # The one fact that is edited below: what the model says behind the bare name.
    true.append(home_town(0, ground_truth="is"))
    mixed = [longer, wrong[0], *true, unknown, *wrong[1:]]
    assert known_facts(editor, mixed) == true
    assert known_facts(editor, []) == []
    # What the model has learnt since plays no part.
    editor.edit(home_town(0), score=False)
    now = bits(editor.lm)
    assert not same_bits(shared("gpt2"), now)
    assert known_facts(editor, mixed) == true
    assert same_bits(editor.lm, now)
