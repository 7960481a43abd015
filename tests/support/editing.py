"""Quick settings under which every method edits every tiny model, edits that surely take, and editors made so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

from everedit.edit import Edit, Probe
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.evaluation.read import read
from everedit.methods import method_class
from everedit.models import LanguageModel
from tests.support import facts
from tests.support.loading import fresh
from tests.support.training import TRAINED, checkpoint

_TARGET: dict[str, Any] = {"steps": 30, "weight_decay": 0.0, "clamp": 10.0, "kl": 0.0, "stop_loss": 0.1}
_SHARED = {"target": _TARGET, "contexts": [[6, 2]]}

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "rome": {"layer": 1, **_SHARED},
    "r-rome": {"layer": 1, **_SHARED},
    "wilke": {"layers": (0, 1), **_SHARED},
    "memit": {"layers": (0, 1), "moment_weight": 0.01, **_SHARED},
    "alphaedit": {"layers": (0, 1), "threshold": 0.05, "ridge": 0.01, **_SHARED},
    "rlsedit": {"layers": (0, 1), "moment_weight": 0.01, **_SHARED},
    "pmet": {"layers": (0, 1), "moment_weight": 0.01, **_SHARED},
    "emmet": {"layers": (0, 1), **_SHARED},
    "ft": {"layers": (1,), "lr": 1e-2},
    "ft-l": {"layers": (1,), "lr": 1e-2, "box": 0.2},
    "ft-m": {"layers": (1,), "lr": 1e-2},
    "kn": {"most": 12, "add": 2.5},
    "lora": {"steps": 24, "lr": 4e-3, "dropout": 0.0},
    "grace": {"layer": 1, "steps": 80, "lr": 0.2},
    "memoir": {"layer": 2, "steps": 80, "contexts": [[6, 2]], "background": 20},
    "wise": {"layer": 2, "steps": 80, "lr": 1.0, "contexts": [[6, 2]], "margins": (0.1, 0.5, 0.3)},
    "t-patcher": {"memory": 400, "silence": 1.0, "first_check": 60, "steps": 300},
    "calinet": {"layer": 2, "slots": 16, "steps": 200, "contexts": [[6, 2]]},
    # What these models read is their facts: other wordings are noise to them.
    "marginalia": {"wordings": 0, "contexts": [[10, 2]]},
    "ike": {"k": 0},
    "ultraedit": {"modules": {"mlp_out": (1, 2)}, "eta": 0.0025, "positions": "all", "ridge": 0.01},
}
"""Settings that suit four narrow layers; a method that is not named here runs with its own defaults."""

_DECODED_ONCE: dict[str, Any] = {"layers": (2,), "lr": 3e-3, "steps": 40}
FAMILY_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    # Its decoder has fewer layers, and reads a whole prompt at one place.
    "t5": {"ft": _DECODED_ONCE, "ft-l": {**_DECODED_ONCE, "box": 0.2}, "ft-m": _DECODED_ONCE},
}
"""What differs by family."""

ONE_STEP = {"kn", "pmet", "ultraedit"}
"""Methods that step toward a target and need not reach it: PMET leaves out what its second vector carried."""

POLICY_SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "simie": ({"lam": 1e-4, "start": "current"}, {"lam": 1e-4, "start": "base"}),
    "nas": ({"samples": 3, "enlarge": False, "skip_beyond": 100.0},),
    "rect": ({"keep": 0.6},),
    "prune": ({"function": "log1_2", "cap": True},),
}
"""The variants in which a policy is tried; one that is not named here runs with its own defaults."""

BASE_MODE: dict[str, Any] = {"lam": 1e-4, "start": "base"}


def unstopped(method: str, **target: Any) -> dict[str, Any]:
    """Return this page's settings for a method, but for a value optimisation that makes all of its steps."""
    return {**METHOD_SETTINGS[method], "target": {**_TARGET, "stop_loss": 0.0, **target}}


def home_town(person: int, target: str | None = None, **more: Any) -> Edit:
    """Return an edit whose subject ends the prompt.

    A tiny model reads a whole name to know an answer, which no change at one of the name's tokens can undo. What
    follows the name at once, though, is decided at its last token, where the methods write, in every family.
    """
    subject, wrong = facts.SUBJECTS[person], facts.counterfactual(facts.facts()[3 * person])
    values = {"prompt": f"The home town of {subject}", "subject": subject, "target_new": target or wrong}
    return Edit.model_validate({**values, **more})


def probes() -> tuple[Probe, ...]:
    """Return two facts of a person whom no edit is about, to see what else an edit moves."""
    return tuple(Probe(prompt=fact.prompt, answer=fact.answer) for fact in facts.facts()[-3:-1])


def make_editor(
    lm: LanguageModel | str, corpus: Path, method: str = "memit", policy: str = "accumulate", **options: Any
) -> Editor:
    """Return an editor with this page's settings for the method, of a model or of a family's tiny one."""
    name = method_class(method).name
    lm = fresh(lm) if isinstance(lm, str) else lm
    settings = FAMILY_SETTINGS.get(lm.layout.family.name, {}).get(name, METHOD_SETTINGS.get(name, {}))
    if name in TRAINED and "checkpoint" not in options.get("method_settings", {}):
        taught = [home_town(person, locality=probes()) for person in (0, 10)]
        folder = corpus.parent / f"{name}-{lm.fingerprint[:12]}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "card.json").exists():
                checkpoint(lm, name, taught, folder)
        options["method_settings"] = {**TRAINED[name], "checkpoint": folder, **options.get("method_settings", {})}
    return Editor(lm, method, policy, **{"method_settings": settings, "corpus": Corpus(corpus, 4096, 64), **options})


def losses(lm: LanguageModel, edits: list[Edit]) -> list[float]:
    """Return the mean loss of each edit's target behind its prompt, in the model as it is."""
    return [reading.nll for reading in read(lm, [(edit.prompt, edit.target_new) for edit in edits])]
