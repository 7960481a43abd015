"""What is asked for, and what is looked at before an edit is made: is it new, can it be made, is it in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from everedit.conflicts import Conflict, conflicts_of, key_bytes
from everedit.edit import Edit
from everedit.engine.settings import validated
from everedit.errors import EditRefused, EvereditError
from everedit.gates import held_by
from everedit.ledger.records import EditRecord, Event
from everedit.living.outcome import Added, SetAside
from everedit.living.times import day, now, person

if TYPE_CHECKING:
    from everedit.living.model import LivingModel

__all__ = ["Options", "Screen", "event_of", "refused"]


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
class Screen:
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

    def set_aside(self, done: Added, item: SetAside) -> None:
        """Set an edit aside, and write that down."""
        done.set_aside.append(item)
        self.living.ledger.note(event_of(item, self.options))


def refused(edit: Edit, error: EvereditError) -> SetAside:
    """Return an edit that could not be made, or did not pass a gate, as set aside."""
    if isinstance(error, EditRefused):
        return SetAside("refused", error.what, error.fix, edit, error.figures)
    return SetAside("cannot be made", error.what, error.fix, edit)


def event_of(item: SetAside, options: Options) -> Event:
    """Return what the ledger notes of an edit that was set aside."""
    return Event(now(), person(options.by), item.why, item.as_dict())
