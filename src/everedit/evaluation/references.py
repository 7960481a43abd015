"""Reference texts about things that share an attribute, which ROME's consistency compares generations with."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everedit.edit import Edit
from everedit.errors import EditError
from everedit.evaluation.texts import TfIdf

__all__ = ["References"]

Key = tuple[str, str]


@dataclass(frozen=True)
class References:
    """Texts by (relation, attribute), and term weights fitted on all of them; an attribute is an id or a name."""

    texts: Mapping[Key, Sequence[str]]
    weights: TfIdf

    @classmethod
    def load(cls, path: Path) -> References:
        """Read ROME's ``attribute_snippets.json``, or JSON Lines of {relation, target, text}.

        Raises :class:`EditError` if the file cannot be read or holds no text.
        """
        texts: dict[Key, list[str]] = defaultdict(list)
        try:
            content = path.read_text(encoding="utf-8-sig")
            lines = path.suffix.lower() in (".jsonl", ".ndjson")
            for record in map(json.loads, content.splitlines()) if lines else json.loads(content):
                relation, target = record.get("relation_id", record.get("relation")), record.get("target_id")
                found = texts[str(relation), str(target or record.get("target"))]
                found += [str(sample["text"]) for sample in record.get("samples", [record])]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise EditError(
                what=f"cannot read the reference texts: {error!r}",
                where=str(path),
                fix="give ROME's attribute_snippets.json, or JSON Lines with relation, target and text",
            ) from error
        if not texts:
            raise EditError(what="the file holds no reference text", where=str(path), fix="give another file")
        return cls(dict(texts), TfIdf.fitted(text for group in texts.values() for text in group))

    def consistency(self, edit: Edit, texts: Sequence[str]) -> float | None:
        """Return the tf-idf cosine of generated texts, joined, and the references for the edit's new attribute, joined.

        None where there are no references for it.
        """
        names = [name for name in (edit.target_id, edit.target_new) if name]
        found = next((self.texts[key] for name in names if (key := (str(edit.relation), name)) in self.texts), None)
        return None if found is None else self.weights.cosine(" ".join(texts), " ".join(found))

    def about(self) -> dict[str, Any]:
        """Return what is worth noting in a result."""
        return {"attributes": len(self.texts), "texts": sum(map(len, self.texts.values()))}
