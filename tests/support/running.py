"""Small runs on tiny models: a file of edits with all kinds of probes, and the config of a run over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everedit.edit import Edit
from everedit.experiments import RunConfig, StatsConfig
from tests.support import facts, tiny
from tests.support.editing import METHOD_SETTINGS, home_town, probes

N_EDITS = 5
MARKS = (1, 3)


def full_edit(person: int) -> Edit:
    """Return an edit with a rephrasing, locality and portability probes, and the old answer."""
    subject, fact = facts.SUBJECTS[person], facts.facts()[3 * person]
    wanted = home_town(person)
    return home_town(
        person,
        ground_truth=fact.answer,
        rephrase=(f"Yes. {wanted.prompt}",),
        locality=probes(),
        portability=({"prompt": f"The city of {subject}", "answer": wanted.target_new},),
    )


def write_records(path: Path, records: list[Any]) -> Path:
    """Write JSON Lines; a text stands for itself."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def records(n: int, first: int = 0) -> list[dict[str, Any]]:
    """Return the records of ``n`` edits."""
    return [full_edit(person).model_dump(mode="json", exclude_defaults=True) for person in range(first, first + n)]


def run_config(data: Path, corpus: Path, family: str = "gpt2", **changes: Any) -> RunConfig:
    """Return the config of a small run over a file, edited by MEMIT under SimIE unless told otherwise."""
    method = changes.get("method", "memit")
    values: dict[str, Any] = {
        "model": str(tiny.trained(family)),
        "device": "cpu",
        "method": method,
        "method_settings": METHOD_SETTINGS[method],
        "policy": "simie",
        "data": str(data),
        "edits": N_EDITS,
        "checkpoints": MARKS,
        "stats": StatsConfig(corpus=corpus, tokens=4096, window_tokens=64),
    }
    return RunConfig.model_validate({**values, **changes})


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file of a run folder."""
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]
