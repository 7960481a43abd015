"""Living models of every method and policy in the registry: kept, opened again, undone and forgotten bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everedit.living import LivingModel
from everedit.methods import method_class, method_names
from everedit.models import LanguageModel
from tests.support.editing import FAMILY_SETTINGS, METHOD_SETTINGS, POLICY_SETTINGS, home_town, make_editor
from tests.support.living import fingerprint, make_living
from tests.support.loading import bits, fresh, same_bits

pytestmark = pytest.mark.usefixtures("own_cache")
EDITS = [home_town(0), home_town(10)]
ALL = {"again": True, "on_conflict": "keep"}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((method, "accumulate", {}) for method in method_names()),
    *(("memit", policy, settings) for policy in POLICY_SETTINGS for settings in POLICY_SETTINGS[policy]),
    ("memit", "simie", {"lam": 1e-4, "solver": "woodbury"}),
    ("rome", "nas+rect+simie+prune", {"nas": {"samples": 6}, "rect": {"keep": 0.6}}),
    ("rlsedit", "prune", {"cap": True}),
    ("ft", "rect", {"keep": 0.3}),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return fresh("gpt2")


def settings_of(lm: LanguageModel, corpus: Path, method: str) -> dict[str, Any]:
    """The quick settings of a method, with its checkpoint where it is trained first."""
    if method_class(method).traits.needs_training:
        return make_editor(lm, corpus, method).method.config.model_dump(mode="json")
    # It need not say its targets here, which takes it longest.
    shorter = {"t-patcher": {"first_check": 20, "steps": 40}}
    return {**METHOD_SETTINGS.get(method, {}), **shorter.get(method, {})}


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    shown = [f"{key}={value}" for key, value in case[2].items() if not isinstance(value, dict)]
    return "-".join([case[0], case[1], *shown])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_living_model_comes_back_from_disk_bit_for_bit(
    case: tuple[str, str, dict[str, Any]], lm: LanguageModel, corpus_path: Path, tmp_path: Path
) -> None:
    method, policy, settings = case
    options = {"policy_settings": settings, "method_settings": settings_of(lm, corpus_path, method)}
    original = bits(lm)
    with make_living(tmp_path / "one", corpus_path, method, policy, lm=lm, **options) as living:
        states = [fingerprint(living)]
        for edit in EDITS:
            assert living.add([edit], **ALL).commits
            states.append(fingerprint(living))
        shown = bits(lm)
        asked = living.ask(EDITS[0].prompt).edited
    assert same_bits(lm, original)
    with LivingModel.open(tmp_path / "one", lm=lm) as living:
        assert fingerprint(living) == states[2]
        assert same_bits(lm, shown)
        assert living.ask(EDITS[0].prompt).edited == asked
        assert living.verify() == 2
        last, first = living.head, living.log()[1].id
        living.undo()
        assert fingerprint(living) == states[1]
        living.undo()
        assert fingerprint(living) == states[0]
        assert same_bits(lm, original)
        living.checkout(last)
        assert fingerprint(living) == states[2]
        assert same_bits(lm, shown)
        done = living.forget(first, how="replay")
        assert done.draft.info["how"] == "replay"
        without = fingerprint(living)
        assert without != states[2]
        living.undo()
        assert fingerprint(living) == states[2]
    with make_living(tmp_path / "two", corpus_path, method, policy, lm=lm, **options) as living:
        living.add([EDITS[1]], **ALL)
        assert fingerprint(living) == without
    assert same_bits(lm, original)


@pytest.mark.parametrize(("family", "dtype", "method"), [("t5", "float32", "ft"), ("gemma2", "bfloat16", "memit")])
def test_other_families_and_narrow_weights_come_back_too(
    family: str, dtype: str, method: str, corpus_path: Path, tmp_path: Path
) -> None:
    """All gates on but that of what was taught, which a tiny model knows too little for."""
    lm = fresh(family, dtype)
    original = bits(lm)
    settings = FAMILY_SETTINGS.get(family, {}).get(method, METHOD_SETTINGS[method])
    gates = {"perplexity": 1e9, "took": None}
    with make_living(
        tmp_path / "one",
        corpus_path,
        method,
        lm=lm,
        method_settings=settings,
        gates=gates,
        conflicts={"near_key": 0.999},
    ) as living:
        for edit in EDITS:
            living.edit(edit)
        assert living.log()[0].draft.info["gates"]["perplexity"] > 0
        state, shown = fingerprint(living), bits(lm)
    assert same_bits(lm, original)
    with LivingModel.open(tmp_path / "one", lm=lm) as living:
        assert fingerprint(living) == state
        assert same_bits(lm, shown)
        assert living.config.dtype == dtype
        assert living.verify() == 2
        living.undo(2)
        assert same_bits(lm, original)
