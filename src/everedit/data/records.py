"""Records of a file, of a folder that holds a known file, or of a copy on the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from everedit.data.dataset import DataSet
from everedit.errors import EditError

__all__ = ["HUB", "locate", "read_text", "records"]

HUB = "hub"
"""What is given in place of a path to get a data set from the Hugging Face hub."""

Columns = Sequence[Sequence[str]]
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def locate(name: str, known: DataSet, path: Path | str | None) -> Path:
    """Return the file of a data set: the one that ships, the one given, or a known one in the folder or on the hub.

    Raises :class:`EditError` that says what was looked for if there is none.
    """
    if path is None:
        if known.built_in is None:
            where_to_get = f", or --data-path {HUB}" if known.hub else ""
            raise EditError(
                what=f"the data set '{name}' does not ship with Everedit",
                fix=f"give its file or folder: --data-path{where_to_get}",
            )
        return known.built_in
    if str(path) == HUB:
        from everedit.data.hub import fetched

        return fetched(name, known)
    source = Path(path).expanduser()
    if not source.is_dir():
        return source
    for candidate in known.files:
        if (source / candidate).is_file():
            return source / candidate
    held = sorted(file.name for file in source.iterdir() if file.suffix.lower() in _SUFFIXES)
    raise EditError(
        what=f"the folder holds no file that is known for '{name}'",
        where=f"{source}, which holds {', '.join(held) or 'no data file'}",
        fix=f"give the file itself; looked for {', '.join(known.files) or 'none, since this is your own data'}",
    )


def records(path: Path, columns: Columns = ()) -> Iterator[tuple[int, Any, str]]:
    """Yield (line, record, problem) of a file; where records are not lines, the line is the position, from 1.

    ``columns`` are those that a CSV file must have, each in one of its spellings. Raises :class:`EditError` if the file
    cannot be read as a whole.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise EditError(
            what=f"cannot tell the format of a '{suffix}' file",
            where=str(path),
            fix="use .jsonl, .json, .csv or .parquet",
        )
    if suffix == ".parquet":
        yield from _parquet_records(path)
        return
    text = read_text(path)
    if suffix == ".csv":
        yield from _csv_records(text, path, columns)
    elif suffix == ".json":
        yield from _json_records(text, path)
    else:
        # Not splitlines(): JSON strings may hold Unicode line separators.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield (number, *_parse(line))


def read_text(path: Path) -> str:
    """Return a file's text. Raises :class:`EditError` if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(what=f"cannot read the file: {error}", where=str(path), fix="give a UTF-8 text file") from error


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
        fix = "name it .jsonl if it holds a record a line; otherwise correct the file"
        raise EditError(what=f"not valid JSON: {error}", where=str(path), fix=fix) from error
    if not isinstance(value, list):
        raise EditError(what="a JSON file of edits holds a list of records", where=str(path), fix="wrap it in [ ]")
    for number, record in enumerate(value, start=1):
        yield (number, *_whole(record))


def _parquet_records(path: Path) -> Iterator[tuple[int, Any, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise EditError(
            what="reading parquet files needs pyarrow", where=str(path), fix='pip install "everedit[parquet]"'
        ) from error
    try:
        table = parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise EditError(what=f"cannot read the file: {error}", where=str(path), fix="give an intact file") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield number, record, ""


def _csv_records(text: str, path: Path, needed: Columns) -> Iterator[tuple[int, Any, str]]:
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
            _check_columns(columns, needed, path)
        elif row:
            record = dict(zip(columns, row, strict=False))
            extra = row[len(columns) :]
            yield first, record, f"more cells than columns: {extra}" if extra else ""
    if not columns:
        _check_columns(columns, needed, path)


def _check_columns(columns: Sequence[str], needed: Columns, path: Path) -> None:
    where = f"{path}, columns: {', '.join(columns) or 'none'}"
    missing = [" or ".join(sorted(names)) for names in needed if not {*names} & {*columns}]
    if missing:
        raise EditError(
            what=f"the CSV lacks the column {' and '.join(missing)}",
            where=where,
            fix=f"name the columns {', '.join(names[0] for names in needed)}, …",
        )
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise EditError(
            what=f"the CSV has two columns named {' and '.join(twice)}",
            where=where,
            fix="give each column one name; several rephrasings need JSONL",
        )
