"""Longer streams of every method under every policy: weights stay finite, and a stream goes on from disk bit for bit.

Each pair of method and policy meets one architecture, in turn, so that all of them are met; what two edits do on every
architecture is in test_matrix.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit.editor import Editor
from everedit.errors import EditError
from everedit.experiments.folder import RunFolder
from everedit.methods import method_class, method_names
from everedit.models.layout import oriented
from everedit.policies import policy_class, policy_names
from tests.support.editing import METHOD_SETTINGS, POLICY_SETTINGS, home_town, losses, make_editor
from tests.support.loading import DECODERS, bits, same_bits

pytestmark = pytest.mark.usefixtures("own_cache")
LENGTH, HALF = 20, 10
EDITS = [home_town(person) for person in range(LENGTH)]


def goes_together(method: str, policy: str) -> bool:
    needs, traits = policy_class(policy).needs, method_class(method).traits
    return (needs != "values" or traits.solves_values) and (needs != "weights" or traits.changes == "weights")


PAIRS = [
    (method, policy, settings)
    for method, policy in itertools.product(method_names(), policy_names())
    for settings in POLICY_SETTINGS.get(policy, ({},))
    if goes_together(method, policy)
]
CELLS = [(*pair, DECODERS[index % len(DECODERS)]) for index, pair in enumerate(PAIRS)]


def editor_of(method: str, policy: str, settings: dict[str, Any], family: str, corpus: Path) -> Editor:
    """An editor whose steps are few: whether its edits take is another test's business."""
    quick = dict(METHOD_SETTINGS.get(method, {}))
    if "target" in quick:
        quick["target"] = {**quick["target"], "steps": 4}
    if "steps" in method_class(method).Config.model_fields:
        quick["steps"] = 4
    return make_editor(family, corpus, method, policy, policy_settings=settings, method_settings=quick)


@pytest.mark.parametrize(("method", "policy", "settings", "family"), CELLS, ids=lambda part: str(part))
def test_twenty_edits_end_with_finite_weights_and_may_be_interrupted(
    method: str, policy: str, settings: dict[str, Any], family: str, corpus_path: Path, tmp_path: Path
) -> None:
    whole, folder = editor_of(method, policy, settings, family, corpus_path), RunFolder(tmp_path)
    base = bits(whole.lm)
    for index, _ in enumerate(whole.stream(EDITS), start=1):
        if index == HALF:
            folder.save_state(whole.state(), HALF)
    touched = {name for name, weight in whole.lm.model.state_dict().items() if not torch.equal(weight, base[name])}
    assert bool(touched) == (whole.method.traits.changes == "weights")
    assert all(bool(torch.isfinite(oriented(whole.lm.layout.module_of(name))).all()) for name in touched)
    again = editor_of(method, policy, settings, family, corpus_path)
    again.prepare()
    state, done = folder.load_state(again.lm.device)
    again.load_state(state)
    for _ in again.stream(EDITS[done:]):
        pass
    assert same_bits(again.lm, bits(whole.lm))
    # What stands beside the weights, too: the same answers, to the bit.
    assert losses(again.lm, EDITS[:3]) == losses(whole.lm, EDITS[:3])
    whole.reset()
    assert same_bits(whole.lm, base)


@pytest.mark.parametrize("other", [{"method": "rome"}, {"policy": "simie"}, {"family": "llama"}])
def test_a_state_of_another_stream_is_refused_and_changes_nothing(
    other: dict[str, str], corpus_path: Path, tmp_path: Path
) -> None:
    chosen = {"method": "memit", "policy": "accumulate", "family": "gpt2"}
    mine = editor_of(chosen["method"], chosen["policy"], {}, chosen["family"], corpus_path)
    mine.edit(EDITS[0], score=False)
    RunFolder(tmp_path).save_state(mine.state(), 1)
    state, _ = RunFolder(tmp_path).load_state(mine.lm.device)
    wanted = {**chosen, **other}
    theirs = editor_of(wanted["method"], wanted["policy"], {}, wanted["family"], corpus_path)
    before = bits(theirs.lm)
    [part] = other
    with pytest.raises(EditError, match=f"made by another {'model' if part == 'family' else part}"):
        theirs.load_state(state)
    assert same_bits(theirs.lm, before)
    assert theirs.norm_ratios() == {}
