"""Read edits from JSON, JSONL or CSV; a bad record is set aside with its line and what to do, never fatal."""

from __future__ import annotations

import csv
import importlib
import io
import json
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from everedit.data import sets
from everedit.edit import Edit, fact_key
from everedit.errors import EditError, near_names

__all__ = ["Loaded", "Rejected", "data_names", "load_edits", "review"]


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
class Loaded:
    """Edits in the order of their file, and the records set aside. ``lines`` are the edits' lines."""

    name: str
    path: Path
    edits: list[Edit] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def data_names() -> dict[str, str]:
    """Return the known data sets with a title each."""
    names = [module.name for module in pkgutil.iter_modules(sets.__path__)]
    return {name: str(_set(name).TITLE) for name in sorted(names)}


def _set(name: str) -> ModuleType:
    return importlib.import_module(f"{sets.__name__}.{name}")


def load_edits(name: str, path: Path | str | None = None, *, keep_contradictions: bool = False) -> Loaded:
    """Return the edits of a data set, or of the file that ``name`` itself is.

    Raises :class:`EditError` if the file cannot be read as a whole; single bad records are set aside.
    """
    if name not in data_names():
        if not Path(name).expanduser().is_file():
            if Path(name).suffix:
                raise EditError(what="there is no such data file", where=name, fix="check the path")
            raise near_names("data set", name, list(data_names()))
        name, path = "plain", name
    module = _set(name)
    if path is None:
        built_in = getattr(module, "BUILT_IN", None)
        if built_in is None:
            raise EditError(what=f"the data set '{name}' does not ship with Everedit", fix="give its file: --data-path")
        path = Path(str(built_in))
    source = Path(path).expanduser()
    found = Loaded(name, source)
    for line, record, problem in _records(source):
        try:
            if problem:
                raise EditError(what=problem, fix="correct the line")
            if not isinstance(record, dict):
                raise EditError(what="the record is not an object with named fields", fix='write {"prompt": …}')
            edit = Edit.parse(_converted(module, record))
        except EditError as error:
            found.rejected.append(Rejected(line, error.what, error.fix, record))
        else:
            found.edits.append(edit)
            found.lines.append(line)
    return review(found, keep_contradictions=keep_contradictions)


def _converted(module: ModuleType, record: dict[str, Any]) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = module.convert(record)
        return fields
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise EditError(
            what=f"the record does not have the form of {module.__name__.rpartition('.')[2]}: {error!r}",
            fix="choose the data set that the file is of, or name its fields as an edit's",
        ) from error


def review(loaded: Loaded, *, keep_contradictions: bool = False) -> Loaded:
    """Set aside edits that repeat an earlier one, or, unless they are kept, give one prompt another target."""
    seen: dict[str, int] = {}
    facts: dict[tuple[str, str], int] = {}
    kept = Loaded(loaded.name, loaded.path, rejected=list(loaded.rejected))
    for edit, line in zip(loaded.edits, loaded.lines, strict=True):
        key = fact_key(edit)
        record = edit.model_dump(mode="json", exclude_defaults=True)
        if edit.id in seen:
            reason = f"the same edit as on line {seen[edit.id]}"
            kept.rejected.append(Rejected(line, reason, "delete one of the two", record))
        elif key in facts and not keep_contradictions:
            reason = f"contradicts line {facts[key]}: the same prompt with another target"
            kept.rejected.append(Rejected(line, reason, "keep the one that holds", record))
        else:
            kept.edits.append(edit)
            kept.lines.append(line)
            seen[edit.id] = line
            facts.setdefault(key, line)
    kept.rejected.sort(key=lambda item: item.line)
    return kept


def _records(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield (line, record, problem) of a file; for a JSON array the line is the position, from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(what=f"cannot read the file: {error}", where=str(path), fix="give a UTF-8 text file") from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv_records(text, path)
    elif suffix == ".json":
        yield from _json_records(text, path)
    elif suffix in (".jsonl", ".ndjson"):
        # Not splitlines(): JSON strings may hold Unicode line separators.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield (number, *_parse(line))
    else:
        raise EditError(
            what=f"cannot tell the format of a '{suffix}' file",
            where=str(path),
            fix="use .jsonl, .json or .csv",
        )


def _parse(line: str) -> tuple[Any, str]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return line.strip(), f"not valid JSON: {error}"
    return _whole(value)


def _whole(value: Any) -> tuple[Any, str]:
    # JSON can write half of a surrogate pair ("\\ud83d"), which no UTF-8 file or screen can show again.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value), "a text holds half of a surrogate pair, which is no character"
    return value, ""


def _json_records(text: str, path: Path) -> Iterator[tuple[int, Any, str]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EditError(what=f"not valid JSON: {error}", where=str(path), fix="correct the file") from error
    if not isinstance(value, list):
        raise EditError(what="a JSON file of edits holds a list of records", where=str(path), fix="wrap it in [ ]")
    for number, record in enumerate(value, start=1):
        yield (number, *_whole(record))


def _csv_records(text: str, path: Path) -> Iterator[tuple[int, Any, str]]:
    # Not splitlines(): cells may hold Unicode line separators. Strict, lest an open quote swallow the rest unseen.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: Sequence[str] = ()
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            lines = f"lines {first} to {rows.line_num}" if rows.line_num > first else f"line {first}"
            problem = f"not valid CSV in {lines}: {error}"
            if not columns:
                raise EditError(what=problem, where=str(path), fix="correct the file") from error
            yield first, None, problem
            continue
        if not columns:
            columns = row
            _check_columns(columns, path)
        elif row:
            record = dict(zip(columns, row, strict=False))
            extra = row[len(columns) :]
            yield first, record, f"more cells than columns: {extra}" if extra else ""
    if not columns:
        _check_columns(columns, path)


def _check_columns(columns: Sequence[str], path: Path) -> None:
    where = f"{path}, columns: {', '.join(columns) or 'none'}"
    missing = {"prompt"} - set(columns) or (
        {"target_new", "target"} if not {"target_new", "target"} & set(columns) else set()
    )
    if missing:
        raise EditError(
            what=f"the CSV lacks the column {' or '.join(sorted(missing))}",
            where=where,
            fix="name the columns prompt, target_new, subject, ground_truth, rephrase, …",
        )
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise EditError(
            what=f"the CSV has two columns named {' and '.join(twice)}",
            where=where,
            fix="give each column one name; several rephrasings need JSONL",
        )
