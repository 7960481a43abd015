"""hallucination: WISE's and SimIE's set from SelfCheckGPT: a passage so far, and the true sentence that follows."""

from __future__ import annotations

from typing import Any

from everedit.data.sets.counterfact import convert as reduced

TITLE = "Hallucinated biographies: a passage so far and its true next sentence (SelfCheckGPT, WISE)"


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit, whose names are CounterFact's; the locality probe is web text."""
    fields = reduced(record)
    for probe in fields.get("locality", ()):
        probe["kind"] = "unrelated"
    return fields
