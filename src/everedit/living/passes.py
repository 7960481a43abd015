"""An edit that does not take at once, made again on top of itself, as one step of the stream.

A policy that holds back, or a method that steps toward its target, may leave an edit half-way; what is then still
missing is what a second pass writes. One commit of one change comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.state import Growth, State
from everedit.outcome import Commit
from everedit.patch import Delta, Dense, LowRank, Patch

__all__ = ["made_in_passes"]


def made_in_passes(
    editor: Editor,
    edits: Sequence[Edit],
    ahead: Sequence[Edit],
    *,
    scale: float,
    most: int,
    enough: Callable[[], bool],
) -> tuple[Commit, int]:
    """Make edits together, again and again until it is ``enough`` or was done ``most`` times; return the one commit
    that it comes to, and how many passes it took.

    Only where changes of weights add up, each on the model as the last one left it, is there a second pass.
    """
    if editor.method.traits.changes != "weights" or editor.policy.edits_from == "base":
        most = 1
    start = editor.state()
    whole = next(editor.stream([*edits, *ahead], len(edits), scale=scale))
    passes = 1
    while passes < most and not enough():
        before = editor.state()
        more = next(editor.stream(edits, len(edits), scale=scale))
        after = editor.state()
        change = _sum(whole.patch, more.patch)
        seconds = {name: whole.seconds.get(name, 0.0) + spent for name, spent in more.seconds.items()}
        whole = Commit(whole.edits, change, change.norm(), more.target_probability, {**whole.seconds, **seconds})
        # The two are taken as the one change that they are written down as, so that its bits come back from there.
        editor.load_state(start)
        editor.take(change, _joined(before.method, after.method), _joined(before.policy, after.policy))
        passes += 1
    return whole, passes


def _sum(one: Patch, other: Patch) -> Patch:
    deltas = dict(one.deltas)
    for name, delta in other.deltas.items():
        deltas[name] = _added(deltas[name], delta) if name in deltas else delta
    return Patch(deltas, one.info)


def _added(one: Delta, other: Delta) -> Delta:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return LowRank(torch.cat([one.left, other.left], 1), torch.cat([one.right, other.right], 1))
    return Dense(one.dense().double() + other.dense().double())


def _joined(before: State, after: State) -> State:
    """Return the state after the second of two steps, with growths that lead to it from before the first."""
    grown = {}
    for name, growth in after.grown.items():
        earlier = before.grown.get(name)
        if earlier is None and growth.before is before.tensors.get(name):
            grown[name] = growth
        elif earlier is not None and earlier.sign == growth.sign and growth.before is before.tensors[name]:
            factor = torch.cat([earlier.factor, growth.factor], 1)
            grown[name] = Growth(factor, growth.sign, earlier.before, earlier.start)
    return State(after.tensors, after.values, grown)
