"""The living model: what a user does with it, each thing in one call. What is on disk is what is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from everedit.conflicts import Conflict, conflicts_among
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.errors import LedgerError
from everedit.gates import Gates
from everedit.ledger.blobs import Blobs
from everedit.ledger.lock import WriterLock
from everedit.ledger.records import CommitRecord, Event, HeldEdit
from everedit.ledger.replay import Replay
from everedit.ledger.store import Ledger
from everedit.ledger.stream import unpack_targets
from everedit.living import comparing, forgetting, opening, writing
from everedit.living.config import LivingConfig
from everedit.living.outcome import Added
from everedit.living.retention import Retention, retention
from everedit.living.screening import Options
from everedit.living.times import day, now, person
from everedit.models import LanguageModel
from everedit.outcome import Answer, EditResult, StreamState

if TYPE_CHECKING:
    from everedit.export import Exported

__all__ = ["LivingModel"]


class LivingModel:
    """A model with every edit ever made to it. ``create`` makes one, ``open`` opens one; both load the base model.

    Any number of processes may have it open. Each call sees what was committed last; one that writes holds a lock
    meanwhile, and is done when all is on disk.
    """

    def __init__(self, path: Path, config: LivingConfig, editor: Editor, ledger: Ledger) -> None:
        self.path, self.editor, self.ledger = path, editor, ledger
        self.config = config.resolved(editor, editor.lm)
        self.lock = WriterLock(path / "lock")
        state = editor.state()
        self.blobs = Blobs(path / "blobs")
        self.replay = Replay(ledger, self.blobs, editor.base_weight, editor.lm.device, state.made_by)
        self.head = ""
        self._gates: Gates | None = None
        self._pending = ""

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: str = "smollm2-135m",
        method: str = "memit",
        policy: str = "accumulate",
        *,
        lm: LanguageModel | None = None,
        device: Any = None,
        **options: Any,
    ) -> LivingModel:
        """Make a living model in a new folder. ``options`` are the other keys of :class:`LivingConfig`.

        ``lm`` is the model itself if it is loaded already. Raises :class:`EvereditError`, and leaves nothing, if the
        folder is taken or the parts do not go together.
        """
        named = {"model": lm.name if lm else model, "method": method, "policy": policy}
        return cls(*opening.made(Path(path).expanduser(), {**named, **options}, lm, device))

    @classmethod
    def open(cls, path: str | Path, *, lm: LanguageModel | None = None, device: Any = None) -> LivingModel:
        """Open a living model and bring it to the state that was committed last.

        Raises :class:`LedgerError` if the folder is none, is damaged, or was made for another base model; everything
        is checked before any of it is used.
        """
        living = cls(*opening.opened(Path(path).expanduser(), lm, device))
        try:
            living.sync()
        except BaseException:
            living.ledger.close()
            raise
        return living

    def close(self) -> None:
        """Let go of the ledger, and give the model its original bits back."""
        self.editor.reset()
        self.ledger.close()

    def __enter__(self) -> Self:
        """Return the living model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def lm(self) -> LanguageModel:
        """The model, edited."""
        return self.editor.lm

    def sync(self) -> None:
        """Go to what was committed last, by whichever process."""
        self.go_to(self.ledger.head)

    def go_to(self, head: str) -> None:
        """Bring the model in memory to a commit; "" is the base model."""
        if head != self.head:
            self.show(self.replay.state(head, (self.head, self.editor.state())), head)

    def show(self, state: StreamState, head: str) -> None:
        """Let the model in memory be ``state``, which is that of the commit ``head``.

        Raises :class:`LedgerError` if method or policy can make nothing of the state.
        """
        try:
            self.editor.load_state(state)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise LedgerError(
                what=f"the state of commit {head[:12]} does not fit the method: {error}",
                where=str(self.path),
                fix="restore the folder from a copy",
            ) from error
        self.head = head

    def _take_pending(self) -> None:
        """Take over the values that the last writer found ahead of time for edits that are yet to be made."""
        blob = self.ledger.about("pending")
        if blob == self._pending:
            return
        state, targets = self.editor.state(), {}
        if blob:
            tensors, info = self.blobs.get(blob)
            targets = unpack_targets(tensors, info["pending"], self.lm.device)
        parts = state.weights, state.method, state.policy
        self.editor.load_state(StreamState(*parts, targets, state.made_by))
        self._pending = blob

    @contextmanager
    def writing(self, wait: float = 0.0) -> Iterator[None]:
        """Hold the lock while the block runs, at the state that was committed last.

        If the block fails, the model in memory is again what is on disk.
        """
        with self.lock.held(wait) as fresh:
            if fresh:
                self.blobs.sweep()
            self.sync()
            self._take_pending()
            start, head = self.editor.state(), self.head
            try:
                yield
            except BaseException:
                if self.ledger.head == head:
                    self.show(start, head)
                else:
                    self.sync()
                raise

    def committed(self, head: str, pending: str | None) -> None:
        """Take note that what is in memory has been committed as ``head``."""
        self.head = head
        if pending is not None and pending != self._pending:
            if self._pending:
                self.blobs.drop(self._pending)
            self._pending = pending
        # A snapshot saves time and nothing else; if there is no room for it now, the next commit tries again.
        with suppress(LedgerError):
            self.replay.snapshot_if_due(head, self.editor.state())

    @property
    def gates(self) -> Gates:
        """The gates; the unedited model is measured when they are first used."""
        if self._gates is None:
            with self.editor.unedited() as lm:
                self._gates = Gates.measured_on(lm, self.config.gates)
        return self._gates

    # ------------------------------------------------------------------ editing

    def edit(self, edits: Edit | Sequence[Edit], **options: Any) -> list[CommitRecord]:
        """Make edits and commit them: all, or none of them. A method that solves batches makes them together.

        Options are those of :class:`everedit.living.screening.Options`. Raises :class:`EditConflict`,
        :class:`EditRefused` or another :class:`EvereditError`; the model is then as before.
        """
        batch = [edits] if isinstance(edits, Edit) else list(edits)
        with self.writing(float(options.get("wait", 0.0))):
            return writing.edit(self, batch, Options.of(options))

    def add(
        self, edits: Sequence[Edit], *, progress: Callable[[int], object] = lambda done: None, **options: Any
    ) -> Added:
        """Make edits one after another, or ``batch`` at a time, each its own commit; set aside what cannot be made.

        Options are those of :class:`everedit.living.screening.Options`. What was committed stays, whatever comes next.
        """
        with self.writing(float(options.get("wait", 0.0))):
            return writing.add(self, list(edits), Options.of(options), progress)

    @contextmanager
    def trial(self, edits: Edit | Sequence[Edit], *, score: bool = True) -> Iterator[EditResult]:
        """Make edits for the length of the block; nothing is written, and the bits are put back."""
        self.sync()
        with self.editor.trial(edits, score=score) as result:
            yield result

    def ask(self, prompt: str, *, max_new_tokens: int = 32) -> Answer:
        """Return the base model's and the edited model's answer."""
        self.sync()
        return self.editor.ask(prompt, max_new_tokens=max_new_tokens)

    def undo(self, steps: int = 1, *, by: str = "", wait: float = 0.0) -> str:
        """Go back by commits, bit for bit, and return the id of the commit that the model stands on then.

        Raises :class:`LedgerError` and changes nothing if there are not so many.
        """
        with self.writing(wait):
            head = self.ledger.back(self.head, steps)
            if steps > 0:
                self._move(head, "undo", by, {"steps": steps})
            return head

    def checkout(self, commit: str, *, by: str = "", wait: float = 0.0) -> str:
        """Go to any commit that was ever made, or to ``base``; return its id."""
        with self.writing(wait):
            head = self.ledger.resolve(commit)
            if head != self.head:
                self._move(head, "checkout", by, {})
            return head

    def _move(self, head: str, action: str, by: str, info: dict[str, Any]) -> None:
        before = self.head
        # First in memory: a commit that cannot be made again is not stood on.
        self.go_to(head)
        self.ledger.move(head, Event(now(), person(by), action, {"from": before, "to": head, **info}))

    def forget(self, commit: str, *, how: forgetting.How = "auto", by: str = "", wait: float = 0.0) -> CommitRecord:
        """Take a commit's edits, or one edit, out of the stream as if they had never been made.

        ``how`` is ``downdate`` (by the algebra of method and policy, where it allows that), ``replay`` (what came later
        is made again) or ``auto``. Returns the commit that says which it was.
        """
        with self.writing(wait):
            return forgetting.forget(self, forgetting.named(self, commit), how, by)

    # ------------------------------------------------------------------ looking

    def log(self, limit: int | None = None, *, everything: bool = False) -> list[CommitRecord]:
        """Return the commits that the model holds, or all that were ever made, the newest first."""
        return list(self.ledger.log(limit, everything=everything))

    def diff(self, one: str, other: str) -> comparing.Diff:
        """Return what differs between two commits: edits, and weights and memories by their size."""
        self.sync()
        return comparing.diff(self, self.ledger.resolve(one), self.ledger.resolve(other))

    def verify(self, progress: Callable[[int], object] = lambda done: None) -> int:
        """Make every state again from the base model and compare all bits; return the number of commits.

        Raises :class:`LedgerError` that names the first commit that differs.
        """
        self.sync()
        return comparing.verify(self, progress)

    def conflicts(self) -> list[Conflict]:
        """Return the conflicts among the edits that the model holds."""
        return list(conflicts_among(self.ledger.held, self.config.conflicts))

    def expired(self, today: str = "") -> list[HeldEdit]:
        """Return the edits that no longer hold on a day (ISO 8601), by default today."""
        return self.ledger.held.expired(day(today) if today else now()[:10])

    def expire(self, today: str = "", *, by: str = "", wait: float = 0.0) -> list[CommitRecord]:
        """Forget the edits that no longer hold on a day."""
        with self.writing(wait):
            items = self.expired(today)
            return [forgetting.forget(self, items, "auto", by, why="expired")] if items else []

    def retention(self, *, blame: bool = True) -> Retention:
        """Score all edits on the present model, and name for each lost one the commit that broke it."""
        self.sync()
        return retention(self, blame=blame)

    @property
    def number(self) -> int:
        """How many commits lead from the base model to the present one."""
        return self.ledger.commit(self.head).number if self.head else 0

    def export(self, format: str, out: str | Path, *, measure: bool = True, **options: Any) -> Exported:
        """Write the edited model as ``merged``, ``peft``, ``gguf`` or ``card`` into the new folder ``out``.

        With ``measure`` the card says what every fact scores and what editing has cost. ``options`` are those of
        :func:`everedit.export.export`.
        """
        from everedit.living.exporting import exported

        self.sync()
        return exported(self, format, out, measure=measure, options=options)

    def adopt(self, folder: str | Path, *, source: str = "", by: str = "", wait: float = 0.0) -> CommitRecord:
        """Take over the difference of a peer's model folder from the base model as the first commit.

        Raises :class:`EvereditError` and changes nothing if it is no such model or there are edits already.
        """
        from everedit.living.exporting import adopt

        with self.writing(wait):
            return adopt(self, folder, source, by)
