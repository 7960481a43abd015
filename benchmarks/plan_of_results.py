"""What the tables of docs/results hold: every method as single edits, and with every sensible policy as a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

METHODS = (
    "memit", "rome", "r-rome", "pmet", "emmet", "alphaedit", "rlsedit", "wilke",
    "ultraedit", "ft", "ft-l", "ft-m", "lora", "kn",
)  # fmt: skip
SOLVES_VALUES = ("memit", "rome", "r-rome", "pmet", "emmet", "alphaedit", "rlsedit")
# Cheap enough for streams of 500: a closed form on one backward pass.
FAST = ("ultraedit",)

# SimIE edits the base model; its lambda was searched by method (docs/results/settings.md, "Streams").
_SIMIE_LAM = {"rome": 10.0, "r-rome": 10.0, "emmet": 10.0}
# What streams need that single edits do not.
_STREAM_METHOD: dict[str, dict[str, Any]] = {"memit": {"moment_weight": 2000.0}}


@dataclass(frozen=True)
class Stream:
    """One stream: a method under a policy, with their settings; ``restrained`` names the same one under PRUNE too.

    PRUNE only changes what is read out: the stream below it is the same, and both are scored in one go.
    """

    method: str
    policy: str
    method_settings: dict[str, Any] = field(default_factory=dict)
    policy_settings: dict[str, Any] = field(default_factory=dict)
    restrained: str | None = None


def streams(method: str) -> list[Stream]:
    """Return a method's streams, plain accumulation first."""
    own = _STREAM_METHOD.get(method, {})
    simie: dict[str, Any] = {"start": "base", "lam": _SIMIE_LAM.get(method, 1.0)}
    # Under SimIE each edit stands alone: what single edits take is right, and a memory of its own would count twice.
    alone = {"keep_previous": False} if method == "alphaedit" else {}
    found = [Stream(method, "accumulate", own, restrained="prune")]
    if method not in ("rlsedit", "ultraedit"):
        found.append(Stream(method, "simie", alone, simie))
    if method in SOLVES_VALUES:
        found.append(Stream(method, "nas", own, restrained="nas+prune"))
    if method in ("memit", "rome"):
        found.append(Stream(method, "rect", own, {"keep": 0.4 if method == "memit" else 0.2}))
    return found
