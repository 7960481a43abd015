"""Every method under every policy on every architecture: it edits what it should and nothing else, or says why not.

The matrix grows by itself: methods and policies come from their registries, families from the tiny models. What
cannot work refuses with :class:`NotApplicable`; anything else that is left out stands in ``tests/skips.json``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit.editor import Editor
from everedit.engine.target import Target
from everedit.errors import NotApplicable
from everedit.methods import method_class, method_names
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.policies import policy_class, policy_names
from tests.support import tiny
from tests.support.editing import METHOD_SETTINGS, ONE_STEP, POLICY_SETTINGS, home_town, losses, make_editor
from tests.support.loading import bits, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

ALL_TOKENS = "teacher-forced/all-tokens@1"
SKIPS_FILE = Path(__file__).parents[1] / "skips.json"
# Records with "method", "policy" and "family", each a name or "*", and the "reason".
SKIPS: list[dict[str, str]] = json.loads(SKIPS_FILE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Case:
    method: str
    policy: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.method, self.policy, *filter(None, [self.settings.get("start")]), self.family])

    def is_in(self, skip: dict[str, str]) -> bool:
        return all(skip[axis] in ("*", getattr(self, axis)) for axis in ("method", "policy", "family"))

    def must_be_refused(self, lm: LanguageModel) -> bool:
        """Whether the traits alone say that it cannot work."""
        traits = method_class(self.method).traits
        foreign = not lm.layout.is_decoder_only and not traits.encoder_decoder
        needs = policy_class(self.policy).needs
        no_weights = needs == "weights" and traits.changes != "weights"
        return foreign or no_weights or (needs == "values" and not traits.solves_values)

    def editor(self, lm: LanguageModel, corpus: Path) -> Editor:
        return make_editor(lm, corpus, self.method, self.policy, policy_settings=self.settings)


CASES = [
    Case(method, policy, family, settings)
    for family in tiny.FAMILIES
    for method in method_names()
    for policy in policy_names()
    for settings in POLICY_SETTINGS.get(policy, ({},))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stream_of_two_edits(case: Case, corpus_path: Path) -> None:
    for skip in SKIPS:
        if case.is_in(skip):
            pytest.skip(skip["reason"])
    lm = shared(case.family)
    if case.must_be_refused(lm):
        with pytest.raises(NotApplicable) as caught:
            case.editor(lm, corpus_path)
        assert case.method in caught.value.what
        assert case.policy in caught.value.what or not lm.layout.is_decoder_only
        assert caught.value.fix
    else:
        editor = case.editor(lm, corpus_path)
        if case.policy != "accumulate" and editor.method.traits.solves_values:
            # What the method wants of the unedited model is the same under every policy: found once for all of them.
            known = found_on_the_unedited_model(case.method, case.family, corpus_path)
            ahead = known if editor.policy.edits_from == "base" else dict(list(known.items())[:1])
            editor.load_state(replace(editor.state(), pending=ahead))
        edits_and_goes_back(editor)


@cache
def found_on_the_unedited_model(method: str, family: str, corpus_path: Path) -> dict[str, Target]:
    editor, edits = make_editor(shared(family), corpus_path, method), [home_town(0), home_town(10)]
    editor.prepare()
    return {edit.id: target for edit, target in zip(edits, editor.method.targets(editor.bench, edits), strict=True)}


def edits_and_goes_back(editor: Editor) -> None:
    before = bits(editor.lm)
    try:
        edits_as_it_should(editor, before)
    finally:
        editor.reset()
    assert same_bits(editor.lm, before)
    assert hooks_left(editor.lm) == []


def edits_as_it_should(editor: Editor, before: dict[str, torch.Tensor]) -> None:
    lm, edits = editor.lm, [home_town(0), home_town(10)]
    unedited, baseline = losses(lm, edits), editor.evaluator.baseline(edits)
    assert not any(baseline.says_already(edit) for edit in edits)
    touched: set[str] = set()
    for edit, loss, commit in zip(edits, unedited, editor.stream(edits), strict=True):
        touched |= set(commit.patch.deltas)
        assert commit.patch.norm() > 0
        # Right after the edit its target has become many times as probable, and it is what the model says; only
        # where a norm behind the MLP bounds what a layer can add may a policy's shrinkage cost the last step.
        # Networks that were trained on the unedited model, and alone, promise nothing of an edited one or of a policy.
        alone = edit is edits[0] and editor.policy.name == "accumulate"
        foreign = editor.method.traits.needs_training and not alone
        assert foreign or losses(lm, [edit])[0] < loss - 3
        bounded = lm.layout.mlp_norm(0) is not None and editor.policy.name != "accumulate"
        if not (bounded or foreign or editor.method.name in ONE_STEP):
            score = editor.evaluator.score([edit], baseline)[0].scores[ALL_TOKENS]
            assert score["reliability"] == 1.0
    # The second edit, of another fact, has not undone the first; networks that were trained on the unedited model may.
    kept = losses(lm, edits)[0] < unedited[0] - (3 if lm.layout.is_decoder_only else 2)
    assert kept or editor.method.traits.needs_training
    changed = {name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == touched
    assert bool(touched) == (editor.method.traits.changes == "weights")
    if touched:
        allowed = set(editor.method.weights(lm.layout))
        assert touched <= allowed if editor.method.traits.chooses_layer else touched == allowed
    ratios = editor.norm_ratios()
    assert ratios.keys() == touched
    # The gradients of an edited model may lie far outside of what networks have been trained on.
    largest = math.inf if editor.method.traits.needs_training else 20
    assert all(0.5 < ratio < largest for ratio in ratios.values())
    assert all(bool(torch.isfinite(oriented(lm.layout.module_of(name))).all()) for name in touched)


def test_the_matrix_is_all_there_is() -> None:
    cells = {(case.method, case.policy, case.family) for case in CASES}
    assert len(cells) == len(method_names()) * len(policy_names()) * len(tiny.FAMILIES)
    assert {"rome", "memit"} <= set(method_names())
    assert {"accumulate", "simie"} <= set(policy_names())
    assert METHOD_SETTINGS.keys() <= set(method_names())
    assert POLICY_SETTINGS.keys() <= set(policy_names())


def test_an_encoder_decoder_is_refused_by_what_it_is(corpus_path: Path) -> None:
    with pytest.raises(NotApplicable, match="rome works on decoder-only models, and t5 is an encoder-decoder"):
        Case("rome", "accumulate", "t5").editor(shared("t5"), corpus_path)


def test_no_skip_is_stale(corpus_path: Path) -> None:
    """A skip names what exists, gives a reason, and the code without it neither refuses the case nor passes."""
    for skip in SKIPS:
        assert len(skip["reason"]) > 20, skip
        cases = [case for case in CASES if case.is_in(skip)]
        assert cases, f"{skip} is about nothing that exists"
        for case in cases:
            lm = shared(case.family)
            assert not case.must_be_refused(lm), f"{skip}: the traits refuse {case} by themselves"
            try:
                edits_and_goes_back(case.editor(lm, corpus_path))
            except Exception:  # a skip may stand for any failure
                continue
            pytest.fail(f"{skip}: {case} works and need not be skipped")
