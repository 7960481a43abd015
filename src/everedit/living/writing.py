"""How edits become commits: screened, made, held against the gates, written, and only then acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from everedit.conflicts import Conflict, key_bytes
from everedit.edit import Edit, fact_key
from everedit.errors import EditConflict, EditError, EditRefused, EvereditError, LedgerError
from everedit.gates import held_by
from everedit.ledger.records import CommitRecord, Draft, EditRecord, Event
from everedit.ledger.steps import step_between
from everedit.ledger.stream import pack_targets
from everedit.living.outcome import Added
from everedit.living.passes import made_in_passes
from everedit.living.screening import Options, Screen, event_of, refused
from everedit.living.times import now
from everedit.outcome import Commit, StreamState

if TYPE_CHECKING:
    from everedit.living.model import LivingModel

__all__ = ["Writer", "add", "edit"]

_SMALLER = (0.5, 0.25, 0.125)


@dataclass
class Writer:
    """Commits that are being made: computed and on disk as tensors, but not yet part of the ledger.

    They lead on from ``parent``; the model in memory is already at the end of them.
    """

    living: LivingModel
    drafts: list[Draft] = field(default_factory=list)
    pending: str | None = None

    def __post_init__(self) -> None:
        self.parent = self.living.head
        self._start = self.living.editor.state()

    def abandon(self) -> None:
        """Bring the model in memory back to where it was when this writer began."""
        self.living.show(self._start, self.living.head)
        self.drafts, self.parent = [], self.living.head

    def stage(
        self, records: Sequence[EditRecord], ahead: Sequence[Edit] = (), *, scale: float = 1.0, **info: Any
    ) -> None:
        """Make edits together as one commit, and hold it against the gates. ``ahead`` are those that come next, whose
        values may be found meanwhile.

        Raises :class:`EvereditError`, and the model in memory is as before, if they cannot be made or fail a gate.
        """
        gates, held = self.living.gates, self.living.ledger.held
        with self._step(records) as (start, keys):
            sample = self._sample()
            edits = [record.edit for record in records]
            commit, passes = made_in_passes(
                self.living.editor, edits, ahead, scale=scale, most=gates.config.passes,
                enough=lambda: gates.took(edits),
            )  # fmt: skip
            figures = gates.check(commit, held.norms(50), sample)
            self._put("edit", start, commit, tuple(records), {**_how(commit, scale, passes), "gates": figures, **info},
                      keys=keys)  # fmt: skip

    def stage_again(self, records: Sequence[EditRecord], ahead: Sequence[Edit], like: CommitRecord) -> None:
        """Make edits as a commit of before made them, in as many passes, without asking the gates a second time."""
        about = like.draft.info
        scale, passes = float(about.get("scale", 1.0)), int(about.get("passes", 1))
        with self._step(records) as (start, keys):
            edits = [record.edit for record in records]
            commit, passes = made_in_passes(
                self.living.editor, edits, ahead, scale=scale, most=passes, enough=lambda: False
            )
            info = {**_how(commit, scale, passes), "remade_from": like.id}
            self._put("edit", start, commit, tuple(records), info, keys=keys)

    @contextmanager
    def _step(self, records: Sequence[EditRecord]) -> Iterator[tuple[StreamState, tuple[bytes, ...]]]:
        """Give the state before a step and the edits' keys; if the block fails, the model in memory is as before it."""
        editor = self.living.editor
        start = editor.state()
        try:
            with editor.unedited():
                keys = key_bytes(editor.method.addresses(editor.bench, [record.edit for record in records]))
            yield start, tuple(keys)
        except BaseException:
            editor.load_state(start)
            raise

    def _sample(self) -> list[Edit]:
        """Return earlier edits that the model holds now."""
        config = self.living.config.gates
        if config.lost is None:
            return []
        # Not seeded with an id, which holds the time: a stream that is made again is judged by the same edits.
        seed = str(self.living.number + len(self.drafts))
        drawn = [item.edit for item in self.living.ledger.held.sample(config.sample, seed)]
        return [edit for edit, held in zip(drawn, held_by(self.living.lm, drawn), strict=True) if held] if drawn else []

    def stage_change(self, kind: Literal["forget", "import"], start: StreamState, commit: Commit, **more: Any) -> None:
        """Make a commit of a change that has been made in memory since ``start``; the edits are no edits of it."""
        info = more.pop("info", {})
        self._put(kind, start, commit, (), info, **more)

    def _put(
        self, kind: Literal["edit", "forget", "import"], start: StreamState, commit: Commit,
        records: tuple[EditRecord, ...], info: dict[str, Any], **more: Any,
    ) -> None:  # fmt: skip
        after = self.living.editor.state()
        if after.pending.keys() - start.pending.keys():
            # On disk before the first of these edits is: whoever goes on from there takes the same values.
            targets, about = pack_targets(after.pending)
            self.pending = self.living.blobs.put(targets, {"pending": about})[0]
        tensors, step, hashes = step_between(start, after, commit.patch)
        blob, size = self.living.blobs.put(tensors, step)
        self.drafts.append(Draft(kind, records, blob, size, hashes, commit.norm, now(), info, **more))

    def commit(self, event: Event | None = None) -> list[CommitRecord]:
        """Write all of it into the ledger at once; when this returns it is acknowledged."""
        living, ledger = self.living, self.living.ledger
        pending = self.pending if living.editor.state().pending else ""
        ids = ledger.append(self.drafts, self.parent, event, pending=pending)
        living.committed(ids[-1], pending)
        self.parent, self.drafts, self._start = ids[-1], [], living.editor.state()
        return [ledger.commit(commit) for commit in ids]


def _how(commit: Commit, scale: float, passes: int) -> dict[str, Any]:
    """Return how a commit was made, as far as that was not in the usual way."""
    about: dict[str, Any] = {"seconds": {name: round(spent, 4) for name, spent in commit.seconds.items()}}
    return about | ({"scale": scale} if scale != 1.0 else {}) | ({"passes": passes} if passes > 1 else {})


def edit(living: LivingModel, edits: list[Edit], options: Options) -> list[CommitRecord]:
    """Make all of the edits, or raise and make none."""
    if not edits:
        raise EditError(what="there is no edit to make", fix="give at least one")
    writer = Writer(living)
    living.editor.prepare()
    for item in edits:
        living.editor.check(item)
    clashes = _clashes(Screen(living, options), edits, options)
    together = living.editor.method.traits.solves_batches and living.editor.policy.edits_from == "current"
    size, part = len(edits) if together else 1, edits
    try:
        _replace(writer, clashes, options)
        for start in range(0, len(edits), size):
            part = edits[start : start + size]
            own = [clash for clash in clashes if clash.edit in part]
            _attempt(writer, [options.record(item) for item in part], edits[start + size :], options, own)
    except EditRefused as error:
        writer.abandon()
        living.ledger.note(*(event_of(refused(item, error), options) for item in part))
        raise
    return writer.commit()


def add(living: LivingModel, edits: list[Edit], options: Options, progress: Callable[[int], object]) -> Added:
    """Make the edits that can be made, and say of the others why not."""
    living.editor.require_batches(options.batch)
    living.editor.prepare()
    screen, done = Screen(living, options), Added()
    queue = [item for item in edits if not screen.sort_out(item, done)]
    singly = 0
    while queue and not done.stopped:
        progress(len(edits) - len(queue))
        group: list[Edit] = []
        clashes: list[Conflict] = []
        while queue and len(group) < (1 if singly else options.batch):
            item = queue.pop(0)
            found = screen.judge(item, group, done)
            if found is not None:
                group.append(item)
                clashes += found
        if not group:
            continue
        writer = Writer(living)
        try:
            _replace(writer, clashes, options)
            _attempt(writer, [options.record(item) for item in group], queue, options, clashes)
            done.commits += writer.commit()
            done.conflicts += clashes
        except LedgerError:
            raise
        except EvereditError as error:
            writer.abandon()
            if len(group) > 1:
                # Which of them it was shows when they are made one by one.
                queue, singly = [*group, *queue], len(group) + 1
            else:
                screen.set_aside(done, refused(group[0], error))
                done.stopped = options.on_refusal == "stop" and isinstance(error, EditRefused)
        singly = max(0, singly - 1)
    return done


def _attempt(
    writer: Writer, records: list[EditRecord], ahead: Sequence[Edit], options: Options, clashes: list[Conflict]
) -> None:
    """Stage edits, with smaller and smaller steps if that is asked for and the method can make them."""
    info = {"conflicts": [conflict.as_dict() for conflict in clashes]} if clashes else {}
    can_shrink = writer.living.editor.method.traits.changes == "weights"
    for scale in (1.0, *(_SMALLER if options.on_refusal == "retry" and can_shrink else ())):
        try:
            writer.stage(records, ahead, scale=scale, **info)
        except EditRefused as error:
            last = error
        else:
            return
    raise last


def _replace(writer: Writer, clashes: Sequence[Conflict], options: Options) -> None:
    """Let the edits that are contradicted be forgotten in front of the new one; near ones stay."""
    from everedit.living.forgetting import stage_forgetting

    old = {clash.held.row: clash.held for clash in clashes if clash.kind != "near key"}
    if old and options.on_conflict == "replace":
        stage_forgetting(writer, list(old.values()), "auto", options.by, why="replaced")


def _clashes(screen: Screen, edits: Sequence[Edit], options: Options) -> list[Conflict]:
    """Return the conflicts of edits with those that the model holds.

    Raises :class:`EditConflict` if they contradict each other, or if a conflict is an error.
    """
    said: dict[tuple[str, str], str] = {}
    for edit in edits:
        if said.setdefault(fact_key(edit), edit.target_new) != edit.target_new:
            raise EditConflict(
                what=f"two of the edits contradict each other: '{said[fact_key(edit)]}' and '{edit.target_new}'",
                where=edit.prompt,
                fix="keep the one that holds",
            )
    clashes = [conflict for edit in edits for conflict in screen.conflicts(edit)]
    if clashes and options.on_conflict == "error":
        more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
        raise EditConflict(
            what=f"{clashes[0]}{more}",
            where=clashes[0].edit.prompt,
            fix="on_conflict='replace' puts it in the place of the older one, 'keep' makes it all the same",
        )
    return clashes
