"""The editor: a model, a method and a policy put together. It edits, asks, tries and takes back; it knows no disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.beside import Attached
from everedit.engine.downdate import Forgotten
from everedit.engine.keys import token_keys
from everedit.engine.moments import Corpus, MomentStore
from everedit.engine.settings import validated
from everedit.engine.state import State
from everedit.engine.target import FindTargets, Target
from everedit.engine.weights import EditedWeights, Face, Snapshot
from everedit.errors import EditError, EvereditError
from everedit.evaluation import EditScores, Evaluator
from everedit.fitting import pool, preparation, require_batches, require_fitting
from everedit.methods import Method, method_class
from everedit.models import LanguageModel, load_model
from everedit.models.layout import oriented
from everedit.outcome import Answer, Commit, EditResult, StreamState
from everedit.patch import Patch
from everedit.policies import Step, make_policy

__all__ = ["PREFETCH", "Answer", "Commit", "EditResult", "Editor", "StreamState"]

# Edits made on the base model are independent of each other; this many have their values optimised together.
PREFETCH = 16


class Editor:
    """Edits one model with one method under one policy.

    ``edit`` commits; ``with trial(edits)`` takes the edits back at the end of the block, bit for bit; ``ask`` shows
    the unedited and the edited model's answers.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: str = "memit",
        policy: str = "accumulate",
        *,
        method_settings: dict[str, Any] | None = None,
        policy_settings: dict[str, Any] | None = None,
        corpus: Corpus | None = None,
        seed: int = 0,
    ) -> None:
        self.lm = lm
        kind = method_class(method)
        self.policy = make_policy(policy, policy_settings or {})
        config = validated(kind.Config, method_settings or {}, f"method {method}")
        self.method: Method = kind(config.resolved(lm.layout))
        self.method.check(lm.layout)
        require_fitting(self.method, self.policy)
        self.evaluator = Evaluator(lm)
        self._weights = EditedWeights(lm, self.policy.read_out if self.policy.reads_out else None)
        self._memory = Attached(lm)
        self.bench = Workbench(lm, MomentStore(lm, corpus or Corpus()), seed, self._weights.master, pool)
        self._method_state, self._policy_state = State(), State()
        self._pending: dict[str, Target] = {}
        # What is found on the unedited model may come from where another run has found it.
        self.find_targets: FindTargets = lambda edits: self.method.targets(self.bench, edits)
        self._prepared = False

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        method: str = "memit",
        policy: str = "accumulate",
        *,
        device: Any = None,
        dtype: Any = None,
        checkpoint: str | Path | None = None,
        **options: Any,
    ) -> Editor:
        """Load ``model`` (alias, folder or hub id) and return an editor for it; ``options`` as in the constructor.

        ``checkpoint`` is the folder that ``everedit train`` wrote, for a method that is trained first.
        """
        if checkpoint is not None:
            options["method_settings"] = {"checkpoint": checkpoint, **(options.get("method_settings") or {})}
        # A misspelt name should not cost the loading of a model.
        method_class(method)
        make_policy(policy, options.get("policy_settings") or {})
        return cls(load_model(model, device=device, dtype=dtype), method, policy, **options)

    def prepare(self) -> None:
        """Gather what the method needs from the unedited model; done by the first edit if not before."""
        if not self._prepared:
            with self._detached():
                # The statistics' provenance names the unedited weights.
                _ = self.bench.moments.provenance
                self.method.prepare(self.bench)
                self.policy.prepare(preparation(self.method, self.bench))
            self._prepared = True

    def check(self, edit: Edit) -> None:
        """Raise an :class:`everedit.errors.EvereditError` if the method cannot make this edit on this model."""
        with self._detached():
            self.method.check_edit(self.bench, edit)

    def edit(self, edits: Edit | Sequence[Edit], *, score: bool = True) -> EditResult:
        """Make edits and commit them; a method that solves batches makes them together.

        With ``score`` the result holds each edit's scores before and after. Raises an
        :class:`everedit.errors.EvereditError` and leaves the model as it was if any of them cannot be made.
        """
        batch = [edits] if isinstance(edits, Edit) else list(edits)
        if not batch:
            raise EditError(what="there is no edit to make", fix="give at least one")
        before: list[EditScores] = []
        baseline = None
        if score:
            with self._detached():
                baseline = self.evaluator.baseline(batch)
            before = self.evaluator.score(batch, baseline)
        start = self.state()
        try:
            if self.method.traits.solves_batches and self.policy.edits_from == "current":
                commits = [self._commit(batch)]
            else:
                commits = list(self.stream(batch))
        except BaseException:
            self.load_state(start)
            raise
        after = self.evaluator.score(batch, baseline) if baseline else []
        return EditResult(commits, before, after)

    def stream(
        self, edits: Iterable[Edit], batch: int = 1, *, scale: float = 1.0, apart: bool = False
    ) -> Iterator[Commit]:
        """Make edits one after another, or ``batch`` at a time, yielding each commit.

        Where the policy edits the base model, or each commit is taken back before the next (``apart``), the values of
        several edits are optimised together ahead of time. ``scale`` is what part of the method's change is made.

        Raises :class:`NotApplicable` for a batch of more than one if the method solves none.
        """
        self.require_batches(batch)
        queue = list(edits)
        for index in range(0, len(queue), batch):
            part = queue[index : index + batch]
            if (apart or self.policy.edits_from == "base") and any(edit.id not in self._pending for edit in part):
                ahead = queue[index : index + max(batch, PREFETCH)]
                self._prefetch([item for item in ahead if item.id not in self._pending])
            yield self._commit(part, scale)

    def require_batches(self, batch: int) -> None:
        """Raise :class:`NotApplicable` for a batch of more than one if the method makes one edit at a time."""
        require_batches(self.method, batch)

    def _prefetch(self, edits: Sequence[Edit]) -> None:
        self.prepare()
        with self._detached():
            try:
                targets = self.find_targets(edits)
            except EvereditError:
                if len(edits) == 1:
                    raise
                # One that cannot be made must not take the others with it.
                targets = self.find_targets(edits[:1])
        self._pending.update({edit.id: target for edit, target in zip(edits, targets, strict=False)})

    def _commit(self, edits: Sequence[Edit], scale: float = 1.0) -> Commit:
        """Compute the change aside, check it, then write it."""
        self.prepare()
        known = [self._pending[edit.id] for edit in edits if edit.id in self._pending]
        with self._detached("base" if self.policy.edits_from == "base" else "stream"):
            method_state, policy_state, targets, step = self._fit(edits, known, scale)
            with self.bench.clock.phase("policy"):
                change, policy_state = self.policy.combine(step, policy_state)
        with self.bench.clock.phase("policy"):
            self._weights.commit(change)
        self._take(method_state, policy_state)
        for edit in edits:
            self._pending.pop(edit.id, None)
        probability = sum(target.probability for target in targets) / len(targets) if targets else None
        return Commit(tuple(edits), change, change.norm(), probability, self.bench.clock.take())

    def _fit(
        self, edits: Sequence[Edit], known: Sequence[Target], scale: float
    ) -> tuple[State, State, Sequence[Target], Step]:
        targets = known if len(known) == len(edits) else self.method.targets(self.bench, edits)
        targets, policy_state = self.policy.adjust(targets, self._policy_state)
        patch, state = self.method.fit(self.bench, edits, self._method_state, targets)
        patch.require_finite()
        patch = patch.scaled(scale) if scale != 1.0 else patch
        keys: dict[str, Tensor] = {}
        if self.policy.reads_keys:
            # Read now, in the model that the method saw.
            with self.bench.clock.phase("keys"):
                keys = token_keys(self.lm, edits, list(patch.deltas))
        layout = self.lm.layout

        def weight(name: str) -> Tensor:
            return oriented(layout.module_of(name)).float()

        return state, policy_state, targets, Step(patch, keys.__getitem__, self._weights.shift, weight)

    def forget(self, forgotten: Forgotten) -> Patch | None:
        """Take one step out of the stream as if it had never been made, where the algebra of method and policy allows
        it; return the change of the weights, or None if it does not.
        """
        method, policy = self._method_state, self._policy_state
        if self.policy.edits_from == "base" and not self.method.traits.keeps_state:
            found = self.policy.forget(forgotten, policy)
            if found is None:
                return None
            change, policy = found
        else:
            found = self.method.forget(self.bench, forgotten, method) if self.policy.only_adds else None
            if found is None:
                return None
            change, method = found
        self.take(change, method, policy)
        return change

    def take(self, change: Patch, method: State | None = None, policy: State | None = None) -> None:
        """Add a change that was made elsewhere to the stream, with the states after it, by default the present ones.

        Raises :class:`everedit.errors.NumericalError` and changes nothing if a weight would not be finite.
        """
        self._weights.commit(change)
        self._take(method or self._method_state, policy or self._policy_state)

    def base_weight(self, name: str) -> Tensor:
        """Return a weight (d_out, d_in) of the unedited model in float32."""
        return self._weights.base(name)

    def shift(self, name: str) -> Tensor:
        """Return the stream's W_now - W_base (d_out, d_in) of a weight in float64."""
        return self._weights.shift(name)

    @contextmanager
    def trial(self, edits: Edit | Sequence[Edit], *, score: bool = True) -> Iterator[EditResult]:
        """Make edits for the length of the block, then put weights and state back, bit for bit."""
        start = self.state()
        try:
            yield self.edit(edits, score=score)
        finally:
            self.load_state(start)

    @contextmanager
    def using(self, method: Method) -> Iterator[None]:
        """Let another method, or the same with other settings, make the edits of the block; the state stays in use."""
        mine, self.method = self.method, method
        try:
            yield
        finally:
            self.method = mine

    def ask(self, prompt: str, *, max_new_tokens: int = 32) -> Answer:
        """Return the unedited and the edited model's greedy continuation of ``prompt``."""
        with self._detached():
            base = self.lm.generate([prompt], max_new_tokens=max_new_tokens)[0]
        return Answer(prompt, base, self.lm.generate([prompt], max_new_tokens=max_new_tokens)[0])

    @contextmanager
    def unedited(self) -> Iterator[LanguageModel]:
        """Give the model with its original bits while the block runs."""
        with self._detached():
            yield self.lm

    def beneath(self) -> AbstractContextManager[None]:
        """Show the model as the stream goes on with it, beneath a policy of read-out, while the block runs."""
        return self._weights.showing("stream")

    @contextmanager
    def _detached(self, face: Face = "base") -> Iterator[None]:
        """Show a face of the weights, and no memory beside them, while the block runs."""
        with self._memory.detached(), self._weights.showing(face):
            yield

    def _take(self, method_state: State, policy_state: State) -> None:
        self._method_state, self._policy_state = method_state, policy_state
        self._memory.put(self.method.memory(self.bench, method_state))

    def reset(self) -> None:
        """Take back every edit: original bits, no state."""
        self.load_state(StreamState(Snapshot({}), State(), State(), {}))

    def state(self) -> StreamState:
        """Return all that the stream is now."""
        parts = self._weights.snapshot(), self._method_state, self._policy_state, dict(self._pending)
        return StreamState(*parts, made_by=self._maker())

    def _maker(self) -> dict[str, str]:
        with self._detached():
            # Computed at the first call, which must see the unedited weights.
            model = self.lm.fingerprint
        return {"method": self.method.name, "policy": self.policy.name, "model": model}

    def load_state(self, state: StreamState) -> None:
        """Go to a state, bit for bit.

        Raises :class:`EditError` and changes nothing if it was made by another method or policy, or on another model.
        """
        if state.made_by:
            for part, mine in self._maker().items():
                if state.made_by.get(part) != mine:
                    raise EditError(
                        what=f"this state was made by another {part}: {state.made_by.get(part, 'unknown')[:40]}",
                        where=f"{part} here: {mine[:40]}",
                        fix="load it into an editor like the one that saved it",
                    )
        self._weights.restore(state.weights)
        self._take(state.method, state.policy)
        self._pending = dict(state.pending)

    def net_change(self) -> Patch:
        """Return all that was done to the weights, as one patch of the unedited model."""
        return self._weights.net_change()

    def norm_ratios(self) -> dict[str, float]:
        """Return ||W_now|| / ||W_base|| of each changed weight."""
        return self._weights.norm_ratios()

    def singular_value_ratios(self) -> dict[str, float]:
        """Return s_max(W_now) / s_max(W_base), the ratio of largest singular values, of each changed weight."""
        return self._weights.singular_value_ratios()
