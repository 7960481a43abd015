"""Small runs on tiny models: a file of edits with all kinds of probes, and the config of a run over it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch

from everedit.edit import Edit
from everedit.experiments import RunConfig, StatsConfig
from everedit.patch import load_tensors
from everedit.reporting import Silent
from tests.support import facts, tiny
from tests.support.editing import METHOD_SETTINGS, home_town, probes

N_EDITS = 5
MARKS = (1, 3)
TIMES = {"seconds", "memory_mb", "peak_memory_mb", "seconds_per_edit", "seconds_before"}


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


def without_times(value: Any) -> Any:
    """Return a value of a run folder without what differs from one time to the next."""
    if isinstance(value, dict):
        return {key: without_times(held) for key, held in value.items() if key not in TIMES}
    return [without_times(held) for held in value] if isinstance(value, list) else value


def same_results(one: Path, other: Path) -> None:
    """Assert that both folders hold the same numbers, texts and final weights."""
    assert without_times(rows_of(one)) == without_times(rows_of(other))
    assert rows_of(one, "samples.jsonl") == rows_of(other, "samples.jsonl")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert without_times(summaries[0]) == without_times(summaries[1])
    (tensors, info), (others, other_info) = (load_tensors(folder / "state.safetensors") for folder in (one, other))
    assert info == other_info
    assert tensors.keys() == others.keys()
    assert any(name.startswith("weights|") for name in tensors)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


class Interrupting(Silent):
    """Sends this process an interrupt once so many edits are done."""

    def __init__(self, after: int) -> None:
        self.after, self.stages = after, []

    def stage(self, text: str, total: int | None = None) -> None:
        self.stages.append(text)

    def step(self, done: int, note: str = "") -> None:
        if self.stages[-1] == "editing" and done == self.after:
            signal.raise_signal(signal.SIGINT)
