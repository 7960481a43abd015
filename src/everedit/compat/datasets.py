"""EasyEdit's data sets as sequences of records, read by our loaders; and files of edits for what reads files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from everedit.cache import cache_root, digest, write_text
from everedit.compat.requests import edit_of
from everedit.data import load_edits
from everedit.edit import Edit
from everedit.errors import EditError

__all__ = ["CounterFactDataset", "EditDataset", "ZsreDataset", "as_file", "edits_of"]


class EditDataset(Sequence[dict[str, Any]]):
    """The records of a file, under EasyEdit's names; :attr:`edits` are the same as edits.

    Records that cannot be used, repeat an earlier one, or have no place in the data set's form are left out; ``size``
    is how many of the others are taken. ``config`` is accepted and not needed: no tokenizer is.

    Raises :class:`EditError` if the file cannot be read or holds none.
    """

    forms: ClassVar[tuple[str, ...]]
    """Our data sets whose form the file may have."""

    def __init__(self, data_dir: str | Path, size: int | None = None, config: Any = None) -> None:
        readings = [load_edits(form, data_dir, keep_contradictions=True) for form in self.forms]
        loaded = max(readings, key=lambda reading: len(reading.edits))
        if not loaded.edits:
            raise EditError(
                what=f"the file holds no record that can be used as one of {' or '.join(self.forms)}",
                where=str(data_dir),
                fix=f"see everedit data validate --data {self.forms[0]}",
            )
        self.edits = loaded.edits[:size]
        self.rejected = loaded.rejected

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return _record(self.edits[index])

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (_record(edit) for edit in self.edits)


class ZsreDataset(EditDataset):
    """ZsRE, edited to ``alt``."""

    forms = ("zsre",)


class CounterFactDataset(EditDataset):
    """CounterFact in EasyEdit's reduced form, or in ROME's own."""

    forms = ("counterfact", "counterfact_full")


def edits_of(dataset: Iterable[Any], argument: str) -> list[Edit]:
    """Return the edits of a data set, of request dictionaries, or of records under EasyEdit's names.

    Raises :class:`EditError` that names the argument and the record that will not do.
    """
    if isinstance(dataset, EditDataset):
        return dataset.edits
    return [_edit_of_item(item, f"{argument}[{index}]") for index, item in enumerate(dataset)]


def _edit_of_item(item: Any, where: str) -> Edit:
    if isinstance(item, Edit):
        return item
    if not isinstance(item, Mapping):
        raise EditError(
            what=f"a data set holds dictionaries, and this is a {type(item).__name__}",
            where=where,
            fix="give a ZsreDataset, a CounterFactDataset, or dictionaries with prompt and target_new",
        )
    return edit_of(item, where)


def as_file(edits: Sequence[Edit]) -> Path:
    """Return a file that holds the edits, made once in the cache: our data sets are files."""
    records = [edit.model_dump(mode="json", exclude_defaults=True) for edit in edits]
    file = cache_root() / "compat" / f"{digest(records)}.jsonl"
    if not file.exists():
        write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return file


def _record(edit: Edit) -> dict[str, Any]:
    record: dict[str, Any] = {
        "prompt": edit.prompt,
        "target_new": edit.target_new,
        "ground_truth": edit.ground_truth,
        "subject": edit.subject,
        "rephrase_prompt": edit.rephrase[0] if edit.rephrase else None,
        "cond": f"{edit.ground_truth} >> {edit.target_new} || {edit.prompt}",
    }
    for section in ("locality", "portability"):
        probes = getattr(edit, section)
        if probes:
            record |= {f"{section}_prompt": probes[0].prompt, f"{section}_ground_truth": probes[0].answer}
    return record
