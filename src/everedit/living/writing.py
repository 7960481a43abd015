"""How edits become commits: screened, made, held against the gates, written, and only then acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from everedit.conflicts import Conflict, conflicts_of, key_bytes
from everedit.edit import Edit
from everedit.engine.settings import validated
from everedit.errors import EditConflict, EditError, EditRefused, EvereditError, LedgerError
from everedit.gates import held_by
from everedit.ledger.records import CommitRecord, Draft, EditRecord, Event
from everedit.ledger.steps import step_between
from everedit.ledger.stream import pack_targets
from everedit.living.outcome import Added, SetAside
from everedit.living.times import day, now, person
from everedit.outcome import Commit, StreamState

if TYPE_CHECKING:
    from everedit.living.model import LivingModel

__all__ = ["Options", "Writer", "add", "edit"]

_SMALLER = (0.5, 0.25, 0.125)


class Options(BaseModel):
    """How edits are added."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str = Field("", description="who makes them; by default the user of this machine")
    source: str = Field("", description="where they come from, such as an address")
    until: str = Field("", description="the last day on which they hold, ISO 8601")
    batch: int = Field(1, ge=1, description="how many are made together, by methods that solve batches")
    on_conflict: Literal["error", "replace", "keep"] = Field(
        "error", description="an edit in conflict is set aside, takes the place of those it contradicts, or is made"
    )
    on_refusal: Literal["skip", "stop", "retry"] = Field(
        "skip", description="an edit that fails a gate is left out, ends the stream, or is tried with smaller steps"
    )
    again: bool = Field(False, description="make edits too that the model holds, or says, already")
    resume: bool = Field(False, description="leave out what was set aside before")
    wait: float = Field(0.0, ge=0, description="seconds to wait for another writer")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Options:
        """Return checked options. Raises :class:`EditError` that names what is wrong."""
        options = validated(cls, values, "adding edits")
        return options.model_copy(update={"until": day(options.until)}) if options.until else options

    def record(self, edit: Edit) -> EditRecord:
        """Return the record of an edit that is made now."""
        return EditRecord(edit, person(self.by), now(), self.source, self.until)


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
        self, records: Sequence[EditRecord], ahead: Sequence[Edit] = (), *, gated: bool = True, scale: float = 1.0,
        info: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Make edits together as one commit. ``ahead`` are those that come next, whose values may be found meanwhile.

        Raises :class:`EvereditError`, and the model in memory is as before, if they cannot be made or fail a gate.
        """
        living = self.living
        editor, held = living.editor, living.ledger.held
        edits = [record.edit for record in records]
        start = editor.state()
        try:
            with editor.unedited():
                keys = key_bytes(editor.method.addresses(editor.bench, edits))
            sample = self._sample() if gated else []
            commit = next(editor.stream([*edits, *ahead], len(edits), scale=scale))
            about = {**(info or {}), "seconds": {name: round(spent, 4) for name, spent in commit.seconds.items()}}
            if scale != 1.0:
                about["scale"] = scale
            if gated:
                about["gates"] = living.gates.check(commit, held.norms(50), sample)
            self._put("edit", start, commit, tuple(records), about, keys=tuple(keys))
        except BaseException:
            editor.load_state(start)
            raise

    def _sample(self) -> list[Edit]:
        """Return earlier edits that the model holds now."""
        config = self.living.config.gates
        if config.lost is None:
            return []
        drawn = [item.edit for item in self.living.ledger.held.sample(config.sample, self.parent)]
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


def edit(living: LivingModel, edits: list[Edit], options: Options) -> list[CommitRecord]:
    """Make all of the edits, or raise and make none."""
    if not edits:
        raise EditError(what="there is no edit to make", fix="give at least one")
    screen, writer = _Screen(living, options), Writer(living)
    living.editor.prepare()
    together = living.editor.method.traits.solves_batches and living.editor.policy.edits_from == "current"
    size = len(edits) if together else 1
    for start in range(0, len(edits), size):
        part = edits[start : start + size]
        for item in part:
            living.editor.check(item)
        clashes = [conflict for item in part for conflict in screen.conflicts(item)]
        if clashes and options.on_conflict == "error":
            raise _conflict_error(clashes)
        try:
            screen.replace(writer, clashes)
            _attempt(writer, [options.record(item) for item in part], edits[start + size :], options, clashes)
        except EditRefused as error:
            writer.abandon()
            living.ledger.note(*(_event(_refused(item, error), options) for item in part))
            raise
    return writer.commit()


def add(living: LivingModel, edits: list[Edit], options: Options) -> Added:
    """Make the edits that can be made, and say of the others why not."""
    living.editor.require_batches(options.batch)
    living.editor.prepare()
    screen, done = _Screen(living, options), Added()
    queue = [item for item in edits if not screen.sort_out(item, done)]
    singly = 0
    while queue and not done.stopped:
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
            screen.replace(writer, clashes)
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
                screen.set_aside(done, _refused(group[0], error))
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
            writer.stage(records, ahead, scale=scale, info=info)
        except EditRefused as error:
            refused = error
        else:
            return
    raise refused


@dataclass
class _Screen:
    """What is looked at before an edit is made."""

    living: LivingModel
    options: Options

    def sort_out(self, edit: Edit, done: Added) -> bool:
        """Whether an edit need not, or cannot, be made whatever comes before it; if so it is set aside."""
        ledger, options = self.living.ledger, self.options
        held = [] if options.again else ledger.held.same(edit)
        if held:
            reason = f"the model holds it already (commit {held[0].commit[:12]})"
            done.set_aside.append(SetAside("held already", reason, "to make it anew: --again", edit))
            return True
        if options.resume and ledger.dealt_with(edit.id):
            done.set_aside.append(SetAside("held already", "it was set aside before", "see everedit log --all", edit))
            return True
        try:
            self.living.editor.check(edit)
        except EvereditError as error:
            self.set_aside(done, SetAside("cannot be made", error.what, error.fix, edit))
            return True
        return False

    def judge(self, edit: Edit, group: Sequence[Edit], done: Added) -> list[Conflict] | None:
        """Return the conflicts with which an edit is to be made now; None if it is not, and set aside."""
        if not self.options.again and held_by(self.living.lm, [edit])[0]:
            item = SetAside(
                "known already", "the target is already the model's answer", "to edit anyway: --again", edit
            )
            self.set_aside(done, item)
            return None
        clashes = self.conflicts(edit)
        inside = [other for other in group if other.prompt.casefold() == edit.prompt.casefold()]
        if inside or (clashes and self.options.on_conflict == "error"):
            reason = str(clashes[0]) if clashes else f"it contradicts '{inside[0].target_new}' in the same batch"
            fix = "--on-conflict replace puts it in the place of the older one, keep makes it all the same"
            figures = {"conflicts": [conflict.as_dict() for conflict in clashes]}
            self.set_aside(done, SetAside("conflict", reason, fix, edit, figures))
            return None
        return clashes

    def conflicts(self, edit: Edit) -> list[Conflict]:
        """Return an edit's conflicts with those that the model holds."""
        living = self.living
        with living.editor.unedited():
            [key] = key_bytes(living.editor.method.addresses(living.editor.bench, [edit]))
        return conflicts_of(edit, key, living.ledger.held, living.config.conflicts)

    def replace(self, writer: Writer, clashes: Sequence[Conflict]) -> None:
        """Let the edits that are contradicted be forgotten in front of the new one; near ones stay."""
        from everedit.living.forgetting import stage_forgetting

        old = {clash.held.row: clash.held for clash in clashes if clash.kind != "near key"}
        if old and self.options.on_conflict == "replace":
            stage_forgetting(writer, list(old.values()), "auto", self.options.by, why="replaced")

    def set_aside(self, done: Added, item: SetAside) -> None:
        """Set an edit aside, and write that down."""
        done.set_aside.append(item)
        self.living.ledger.note(_event(item, self.options))


def _refused(edit: Edit, error: EvereditError) -> SetAside:
    if isinstance(error, EditRefused):
        return SetAside("refused", error.what, error.fix, edit, error.figures)
    return SetAside("cannot be made", error.what, error.fix, edit)


def _event(item: SetAside, options: Options) -> Event:
    return Event(now(), person(options.by), item.why, item.as_dict())


def _conflict_error(clashes: Sequence[Conflict]) -> EditConflict:
    more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
    return EditConflict(
        what=f"{clashes[0]}{more}",
        where=clashes[0].edit.prompt,
        fix="on_conflict='replace' puts it in the place of the older one, 'keep' makes it all the same",
    )
