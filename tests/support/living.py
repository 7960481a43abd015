"""Living models of tiny models, and what two of them must have in common to be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everedit.edit import Edit
from everedit.ledger.steps import hashes_of
from everedit.living import LivingModel
from everedit.models import LanguageModel
from tests.support import facts
from tests.support.editing import METHOD_SETTINGS
from tests.support.loading import edit_of, fresh

LENIENT: dict[str, Any] = {"took": None, "perplexity": None, "norm": None, "lost": None}
"""Gates for tests that are not about gates: tiny models know a few sentences only, and forget them readily."""
STATS = {"tokens": 4096, "window_tokens": 64}


def make_living(
    path: Path, corpus: Path, method: str = "ultraedit", policy: str = "accumulate", *, lm: LanguageModel | None = None,
    **options: Any,
) -> LivingModel:  # fmt: skip
    """Make a living model of the tiny GPT-2, with quick settings and lenient gates."""
    chosen = {
        "method_settings": METHOD_SETTINGS.get(method, {}),
        "stats": {"corpus": str(corpus), **STATS},
        "gates": LENIENT,
        "conflicts": {"near_key": None},
        **options,
    }
    return LivingModel.create(path, method=method, policy=policy, lm=lm or fresh("gpt2"), **chosen)


def stream(count: int) -> list[Edit]:
    """Return edits of different facts, each of which contradicts what the tiny model knows."""
    return [edit_of(fact, rephrase=()) for fact in facts.facts()[:count]]


def fingerprint(living: LivingModel) -> dict[str, str]:
    """Return the hashes of all that the living model is in memory: weights, and states of method and policy."""
    return hashes_of(living.editor.state())
