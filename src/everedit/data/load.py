"""Read the edits of a data set or of a file; a bad record is set aside with its line and what to do, never fatal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everedit.data.dataset import DataSet, Fields, Record, data_names, data_set
from everedit.data.records import locate, records
from everedit.edit import Edit, Probe, fact_key, subject_span
from everedit.errors import EditError, near_names

__all__ = ["Loaded", "Notice", "Rejected", "load_edits", "review"]


@dataclass(frozen=True)
class Rejected:
    """A record that was set aside: its line (or position), why, and what to do."""

    line: int
    reason: str
    fix: str
    record: Any

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for saving."""
        return {"line": self.line, "reason": self.reason, "fix": self.fix, "record": self.record}


@dataclass(frozen=True)
class Notice:
    """Something that was left out of a record that could be used all the same."""

    line: int
    what: str


@dataclass(frozen=True)
class Loaded:
    """Edits in the order of their file, and the records set aside. ``lines`` are the edits' lines."""

    name: str
    path: Path
    edits: list[Edit] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


def load_edits(name: str, path: Path | str | None = None, *, keep_contradictions: bool = False) -> Loaded:
    """Return the edits of a data set, or of the file that ``name`` itself is.

    ``path`` is a file, a folder that holds a file known for the data set, or ``"hub"`` for its copy on the Hugging Face
    hub. Raises :class:`EditError` if the file cannot be read as a whole; single bad records are set aside.
    """
    if name.replace("_", "-") not in data_names():
        if not Path(name).expanduser().is_file():
            if Path(name).suffix:
                raise EditError(what="there is no such data file", where=name, fix="check the path")
            raise near_names("data set", name, data_names())
        name, path = "plain", name
    known, name = data_set(name), name.replace("_", "-")
    stream = _Stream(Loaded(name, locate(name, known, path)), keep_contradictions)
    for line, record, problem in records(stream.kept.path, known.columns):
        try:
            if problem:
                raise EditError(what=problem, fix="correct the line")
            if not isinstance(record, dict):
                raise EditError(what="the record is not an object with named fields", fix='write {"prompt": …}')
            notices: list[str] = []
            edits = [Edit.parse(_set_right(known, fields, notices)) for fields in _converted(name, known, record)]
        except EditError as error:
            stream.reject(line, error, record)
        else:
            stream.kept.notices.extend(Notice(line, what) for what in notices)
            stream.add(line, edits, record)
    return stream.ended()


def review(loaded: Loaded, *, keep_contradictions: bool = False) -> Loaded:
    """Set aside edits that repeat an earlier one, or, unless they are kept, give one prompt another target."""
    kept = Loaded(loaded.name, loaded.path, rejected=list(loaded.rejected), notices=list(loaded.notices))
    stream = _Stream(kept, keep_contradictions)
    for edit, line in zip(loaded.edits, loaded.lines, strict=True):
        stream.add(line, [edit], edit.model_dump(mode="json", exclude_defaults=True))
    return stream.ended()


class _Stream:
    """Edits as they are taken into a stream, and what is known of the earlier ones."""

    def __init__(self, kept: Loaded, keep_contradictions: bool) -> None:
        self.kept = kept
        self._keep_contradictions = keep_contradictions
        self._places: dict[str, int] = {}
        self._facts: dict[tuple[str, str], int] = {}

    def add(self, line: int, edits: Sequence[Edit], record: Any) -> None:
        """Take in the edits of a record; set the record aside if it repeats or contradicts an earlier one.

        Of several edits that belong together, those that an earlier record made are not made again, and the probes of
        the last one, which need them all, are asked from whichever is the last in the stream.
        """
        try:
            if len(edits) == 1 and edits[0].id in self._places:
                where = self.kept.lines[self._places[edits[0].id]]
                raise EditError(what=f"the same edit as on line {where}", fix="delete one of the two")
            if not self._keep_contradictions:
                self._require_new_facts(edits)
        except EditError as error:
            self.reject(line, error, record)
            return
        asked = edits[-1].portability if len(edits) > 1 else ()
        places = []
        for edit in edits:
            if edit.id not in self._places:
                self._places[edit.id] = len(self.kept.edits)
                self._facts.setdefault(fact_key(edit), line)
                self.kept.edits.append(edit.model_copy(update={"portability": ()}) if asked else edit)
                self.kept.lines.append(line)
            places.append(self._places[edit.id])
        if asked:
            self._ask_from(max(places), asked)

    def _require_new_facts(self, edits: Iterable[Edit]) -> None:
        for edit in edits:
            if edit.id not in self._places and (line := self._facts.get(fact_key(edit))) is not None:
                reason = f"contradicts line {line}: the same prompt with another target"
                raise EditError(what=reason, fix="keep the one that holds")

    def _ask_from(self, place: int, probes: tuple[Probe, ...]) -> None:
        edit = self.kept.edits[place]
        self.kept.edits[place] = edit.model_copy(update={"portability": (*edit.portability, *probes)})

    def reject(self, line: int, error: EditError, record: Any) -> None:
        """Set a record aside."""
        self.kept.rejected.append(Rejected(line, error.what, error.fix, record))

    def ended(self) -> Loaded:
        """Return what has come of it, the records set aside in the order of their lines."""
        self.kept.rejected.sort(key=lambda item: item.line)
        return self.kept


def _converted(name: str, known: DataSet, record: Record) -> Sequence[Fields]:
    try:
        found = known.convert(record)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise EditError(
            what=f"the record does not have the form of {name}: {error!r}",
            fix="choose the data set that the file is of, or name its fields as an edit's",
        ) from error
    return [found] if isinstance(found, dict) else found


def _set_right(known: DataSet, fields: Fields, notices: list[str]) -> Fields:
    """Return the fields that say something, without probes that lack a prompt or an answer; say what was left out."""
    kept = {key: value for key, value in fields.items() if value is not None and value != []}
    for group in ("locality", "portability"):
        whole = [item for item in kept.get(group, ()) if not (isinstance(item, dict) and _lacking(item))]
        for item in kept.get(group, ()):
            if isinstance(item, dict) and (part := _lacking(item)):
                shown = str(item.get("prompt") or item.get("answer") or "").strip()[:40]
                notices.append(f"a {group} probe without {part} is left out: {shown!r}")
        if group in kept:
            kept[group] = whole
    subject, prompt = kept.get("subject"), kept.get("prompt")
    elsewhere = isinstance(subject, str) and isinstance(prompt, str) and subject_span(prompt, subject.strip()) is None
    if known.subject_may_be_elsewhere and elsewhere:
        notices.append(f"the subject {subject!r} is left out, as it is not in the prompt: no method can locate it")
        del kept["subject"]
    return kept


def _lacking(probe: Fields) -> str:
    """Return which of prompt and answer a probe has only as an empty text, if any."""
    for part, name in (("prompt", "a prompt"), ("answer", "an answer")):
        value = probe.get(part)
        if isinstance(value, str) and not value.strip():
            return name
    return ""
