"""Policies together: each at its stage whatever the order of names, each with its settings and state, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import combinations_with_replacement, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit import experiments
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import EditError, NotApplicable, UnknownName
from everedit.experiments.folder import RunFolder
from everedit.experiments.run import Silent
from everedit.models import LanguageModel
from everedit.patch import Dense, Patch, load_tensors
from everedit.policies import Policy, PolicyConfig, Stack, Step, make_policy, policy_class
from everedit.policies._base import STAGES
from tests.support.editing import METHOD_SETTINGS, home_town, losses, make_editor, unstopped
from tests.support.loading import bits, fresh, hooks_left, same_bits
from tests.support.running import records, rows_of, run_config, write_records

pytestmark = pytest.mark.usefixtures("own_cache")

NAME = "layer.weight"
FOUR = ("nas", "rect", "simie", "prune")
# Under which each of them surely has an effect on the first edit of a tiny model.
SETTINGS: dict[str, dict[str, Any]] = {
    "nas": {"samples": 6, "skip_beyond": 100.0},
    "rect": {"keep": 0.6},
    "simie": {"lam": 1e-4},
    "prune": {"function": "log"},
}
TOGETHER = [("gpt2", "nas+simie"), ("llama", "rect+simie+prune"), ("gemma2", "nas+prune")]


def settings_of(names: str) -> dict[str, Any]:
    return {name: SETTINGS[name] for name in names.split("+")}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def target(length: float) -> Target:
    return Target(torch.ones(4), torch.zeros(4), (), 1.0, torch.tensor([length, 0.0, 0.0, 0.0]))


# --------------------------------------------------------------------------- order


def marking(mark: str, told: list[str]) -> Policy:
    """A policy that stands at the stage ``mark`` and tells of each call that has an effect there."""

    class Marking(Policy):
        name, title, stage = mark, mark, mark

        def adjust(self, targets: Sequence[Target], state: State) -> tuple[list[Target], State]:
            told.append(f"adjust {mark}")
            return super().adjust(targets, state)

        def filter(self, step: Step) -> Patch:
            told.append(f"filter {mark}")
            return super().filter(step)

        def combine(self, step: Step, state: State) -> tuple[Patch, State]:
            told.append(f"combine {mark}")
            return super().combine(step, state)

        def read_out(self, base: Tensor, shift: Tensor) -> Tensor:
            told.append(f"read_out {mark}")
            return super().read_out(base, shift)

    return Marking(PolicyConfig())


@pytest.mark.parametrize("order", list(permutations(STAGES)), ids="+".join)
def test_stages_come_in_their_order_whatever_the_order_of_names(order: tuple[str, ...]) -> None:
    told: list[str] = []
    stack = Stack([marking(stage, told) for stage in order])
    step = Step(Patch({NAME: Dense(normal(2, 3, seed=1))}), {}.__getitem__, {}.__getitem__, {}.__getitem__)
    assert stack.adjust([target(1.0)], State())[0][0].before[0] == 1.0
    assert stack.combine(step, State()) == (step.patch, State())
    matrix = normal(2, 3, seed=2)
    assert stack.read_out(matrix, matrix) is matrix
    # A change is let through stage by stage, and only the stream's stage combines it.
    calls = [f"{call} {stage}" for call in ("adjust", "filter") for stage in STAGES] + ["combine stream"]
    assert told == [*calls, *(f"read_out {stage}" for stage in STAGES)]
    names = {stage: name for name in FOUR for stage in STAGES if policy_class(name).stage == stage}
    named = make_policy("+".join(names[stage] for stage in order), {})
    assert named.name == "nas+rect+simie+prune"
    assert (named.reads_keys, named.reads_out) == (True, True)


def test_a_change_is_first_filtered_and_then_combined() -> None:
    weight, raw, keys = normal(3, 5, seed=1), normal(3, 5, seed=2), normal(5, 2, seed=3)
    step = Step(Patch({NAME: Dense(raw)}), {NAME: keys}.__getitem__, {}.__getitem__, {NAME: weight}.__getitem__)
    change, state = make_policy("simie+rect", {"simie": {"lam": 0.5}, "rect": {"keep": 0.4}}).combine(step, State())
    scores = raw.abs() / weight.abs()
    largest = torch.where(scores >= scores.flatten().sort().values[-6], raw, 0.0)
    assert int(largest.count_nonzero()) == 6
    p = 0.5 * torch.eye(5).double() + keys @ keys.T
    assert torch.allclose(change.deltas[NAME].dense(), largest @ keys @ keys.T @ torch.linalg.inv(p))
    assert torch.allclose(state.tensors[f"P|{NAME}"], p)


def test_each_policy_of_a_stack_keeps_what_it_remembers() -> None:
    """NAS counts the edits that it skipped, and SimIE all edits, in one state."""
    stack, state = make_policy("nas+simie", {"nas": {"anchor": 1.0}}), State()
    step = Step(
        Patch({NAME: Dense(normal(3, 5, seed=1))}), {NAME: normal(5, 2, seed=2)}.__getitem__, {}.get, {}.__getitem__
    )
    for length in (1.5, 2.5, 9.0, 0.3):
        _, state = stack.adjust([target(length)], state)
        _, state = stack.combine(step, state)
    assert state.tensors.keys() == {f"P|{NAME}"}
    assert state.values == {"edits": 4, "skipped": 2}


def test_an_edit_is_made_on_the_base_model_if_any_policy_says_so() -> None:
    both = [make_policy("prune+simie", {"simie": {"start": start}}).edits_from for start in ("base", "current")]
    assert both == ["base", "current"]
    assert (make_policy("nas+rect", {}).edits_from, make_policy("nas+rect", {}).reads_keys) == ("current", False)


# --------------------------------------------------------------------------- what does not go together


PAIRS = [
    pair
    for pair in combinations_with_replacement(sorted({*FOUR, "accumulate"}), 2)
    if len({policy_class(name).stage for name in pair}) == 1
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_policies_of_one_stage_are_refused_by_name(pair: tuple[str, str]) -> None:
    assert ("accumulate", "simie") in PAIRS
    third = "rect" if "rect" not in pair else "nas"
    for names in (pair, pair[::-1], (pair[0], third, pair[1])):
        with pytest.raises(NotApplicable, match=policy_class(pair[0]).stage) as caught:
            make_policy("+".join(names), {})
        assert all(name in caught.value.what for name in pair)
        assert third not in caught.value.what
        assert caught.value.fix


@pytest.mark.parametrize("names", ["simi", "nas+simi", "simi+prune", "nas+", "nas++simie"])
def test_an_unknown_policy_in_a_stack_is_named_with_near_ones(names: str) -> None:
    with pytest.raises(UnknownName, match=r"did you mean simie|choose one of: accumulate"):
        make_policy(names, {})


# --------------------------------------------------------------------------- settings


def test_settings_are_flat_for_one_policy_and_by_name_for_several() -> None:
    for settings in ({"lam": 7.0}, {"simie": {"lam": 7.0}}):
        assert make_policy("simie", settings).settings == {"lam": 7.0, "start": "current", "solver": "cholesky"}
    several = make_policy("prune+simie+nas", {"simie": {"lam": 7.0}, "prune": {"function": "log2"}})
    assert several.settings.keys() == {"nas", "simie", "prune"}
    assert (several.settings["simie"]["lam"], several.settings["prune"]["function"]) == (7.0, "log2")
    assert several.settings["nas"] == make_policy("nas", {}).settings
    # What is told of a stack makes it again.
    for stack in (several, make_policy("simie", {"lam": 7.0})):
        again = make_policy(stack.name, json.loads(json.dumps(stack.settings)))
        assert (again.name, again.settings) == (stack.name, stack.settings)


@pytest.mark.parametrize(
    ("names", "settings", "kind", "says"),
    [
        ("nas+simie", {"simi": {}}, UnknownName, "'simi'.*\n.*did you mean simie"),
        ("nas+simie", {"simie": {}, "prune": {}}, UnknownName, "'prune'.*\n.*choose one of: nas, simie"),
        ("nas+simie", {"lam": 1.0}, UnknownName, "'lam'.*\n.*nas"),
        ("simie", {"simie": {}, "nass": {}}, UnknownName, "'nass'"),
        ("nas+simie", {"simie": {"lambda": 1.0}}, EditError, r"(?s)lambda.*policy simie.*known settings: lam, start"),
        ("nas+simie", {"nas": {"quantile": 2.0}}, EditError, "quantile.*policy nas"),
        ("nas+simie", {"simie": 3}, EditError, "policy simie"),
        ("rect", {"keep": 0.0}, EditError, "keep.*policy rect"),
        ("prune", {"function": "log3"}, EditError, "function.*policy prune"),
    ],
)
def test_bad_settings_say_whose_they_are(names: str, settings: dict[str, Any], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        make_policy(names, settings)


# --------------------------------------------------------------------------- in an editor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "names"), TOGETHER)
def test_a_stack_edits_goes_back_and_goes_on_bit_for_bit(
    family: str, names: str, dtype: str, corpus_path: Path, tmp_path: Path
) -> None:
    def edited(lm: LanguageModel, names: str) -> Editor:
        # All steps of the values' optimisation, so that an edit is large enough for PRUNE to restrain.
        options = {"policy_settings": settings_of(names), "method_settings": unstopped("memit")}
        return make_editor(lm, corpus_path, "memit", names, **options)

    def opened() -> Editor:
        return edited(fresh(family, dtype), names)

    editor, edits = opened(), [home_town(person) for person in (0, 10, 20)]
    before, unedited = bits(editor.lm), losses(editor.lm, edits)
    stream, after = editor.stream(edits[:2]), []
    for edit, loss, commit in zip(edits, unedited, stream, strict=False):
        assert commit.norm > 0
        assert losses(editor.lm, [edit])[0] < loss - 2
        after.append(bits(editor.lm))
    RunFolder(tmp_path).save_state(editor.state(), 2)
    with editor.unedited() as lm:
        assert same_bits(lm, before)
    with editor.trial(edits[2], score=False):
        three = bits(editor.lm)
        assert not same_bits(editor.lm, after[1])
    assert same_bits(editor.lm, after[1])

    other = opened()
    state, done = RunFolder(tmp_path).load_state(other.lm.device)
    other.load_state(state)
    assert done == 2
    assert same_bits(other.lm, after[1])
    assert other.state().policy.values == editor.state().policy.values
    other.edit(edits[2], score=False)
    assert same_bits(other.lm, three)
    for one in (editor, other):
        one.reset()
        assert same_bits(one.lm, before)
        assert one.state().policy == State()
        assert hooks_left(one.lm) == []
    # Each policy has had a hand in it: without any one of them the first edit leaves other bits.
    for name in names.split("+"):
        rest = "+".join(other for other in names.split("+") if other != name)
        less = edited(editor.lm, rest)
        less.edit(edits[0], score=False)
        assert not same_bits(editor.lm, after[0]), f"{name} does nothing here"
        less.reset()


# --------------------------------------------------------------------------- in a run


class Cut(Silent):
    """Interrupts a run once so many edits are done."""

    def __init__(self, after: int) -> None:
        self.after, self.now = after, ""

    def stage(self, text: str, total: int | None = None) -> None:
        self.now = text

    def step(self, done: int, note: str = "") -> None:
        if self.now == "editing" and done == self.after:
            raise KeyboardInterrupt


def test_a_run_under_a_stack_resumes_to_the_same_end(
    corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "cache"))
    data, folders = write_records(tmp_path / "edits.jsonl", records(4)), [tmp_path / "whole", tmp_path / "cut"]
    settings = {"nas": {"samples": 6}, "simie": {"lam": 0.1}}
    config = run_config(data, corpus_path, policy="simie+nas", policy_settings=settings, edits=4, checkpoints=(2,))
    experiments.start(config, folders[0])
    with pytest.raises(KeyboardInterrupt):
        experiments.start(config, folders[1], reporter=Cut(2))
    # The anchor is measured again, on a model that is loaded unedited.
    shutil.rmtree(tmp_path / "cache" / "anchors")
    experiments.resume(folders[1])
    assert [path.suffix for path in (tmp_path / "cache" / "anchors").iterdir()] == [".json"]
    spent = ("seconds", "memory_mb", "peak_memory_mb")
    rows = [[{key: row[key] for key in row if key not in spent} for row in rows_of(folder)] for folder in folders]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6
    (tensors, info), (others, other_info) = (load_tensors(folder / "state.safetensors") for folder in folders)
    assert info == other_info
    assert info["policy"]["edits"] == 4
    assert tensors.keys() == others.keys()
    assert {name.partition("|")[0] for name in tensors} == {"weights", "policy"}
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    told = json.loads((folders[0] / "config.json").read_text())
    assert told["policy"] == "nas+simie"
    assert (told["settings"]["policy"]["simie"]["lam"], told["settings"]["policy"]["nas"]["samples"]) == (0.1, 6)


@pytest.mark.parametrize(
    ("method", "names", "says"),
    [
        ("ft", "nas", "nas works on solved values, and ft solves for none"),
        ("ft-l", "simie+nas+prune", "nas works on solved values, and ft-l solves for none"),
        ("wilke", "nas+simie", "nas works on solved values, and wilke solves for none"),
        ("memit", "simie+accumulate", "simie and accumulate both decide"),
        ("rome", "prune+nas+prune", "prune and prune both decide"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    method: str, names: str, says: str, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("EVEREDIT_CACHE", str(cache))
    with pytest.raises(NotApplicable, match=says):
        Editor(fresh("gpt2"), method, names, corpus=Corpus(corpus_path, 4096, 64))
    data = write_records(tmp_path / "edits.jsonl", records(2))
    config = run_config(data, corpus_path, method=method, policy=names, edits=2, checkpoints=())
    with pytest.raises(NotApplicable, match=says):
        experiments.start(config, tmp_path / "run")
    assert list(cache.rglob("*")) == []
    # No run has begun, so that the same folder will do once the names are right.
    assert not (tmp_path / "run" / "config.json").exists()
    fitting = {"method": "rome", "method_settings": METHOD_SETTINGS["rome"], "policy": "prune"}
    experiments.start(config.model_copy(update=fitting), tmp_path / "run")
    assert list((cache / "moments").rglob("*.safetensors"))
