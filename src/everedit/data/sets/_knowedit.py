"""What KnowEdit's parts share: probes by kind, with answers as texts, lists, or lists of alias lists."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import as_list, listed, probes
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import KINDS, named


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit."""
    return {
        **named(record),
        **listed(record.get("target_new"), "target_new", "target_aliases"),
        **{name: record.get(name) for name in ("prompt", "subject")},
        "ground_truth": listed(record.get("ground_truth"), "answer", "others")["answer"] or None,
        "rephrase": as_list(record.get("rephrase_prompt") or record.get("rephrase")),
        "locality": probes(record.get("locality") or {}, KINDS),
        "portability": probes(record.get("portability") or {}, KINDS),
    }


def part(title: str, files: tuple[str, ...], hub: str, **more: Any) -> DataSet:
    """Return one of KnowEdit's parts."""
    given: dict[str, Any] = {"convert": convert, "protocols": ("knowedit/portability@1", "wise/lifelong@1"), **more}
    return DataSet(
        title, licence="MIT", files=files, hub=f"zjunlp/KnowEdit/benchmark/{hub}", paper="Zhang et al. 2024", **given
    )
