"""The benchmark for large models runs on a tiny one as it is: no time on a GPU is spent on finding its faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.usefixtures("own_cache")
def test_every_method_and_batch_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    out = tmp_path / "gpu.jsonl"
    options = ["--shape", "tiny", "--device", "cpu", "--tokens", "256", "--steps", "3", "--out", str(out)]
    rows = gpu.main(options)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    measured = {(row["method"], row["batch"]) for row in rows}
    batched = {(name, batch) for name in ("memit", "alphaedit", "ultraedit") for batch in (1, 3)}
    plain = {(f"{name}, plain value optimisation", 1) for name in ("rome", "memit", "alphaedit")}
    assert measured == {("rome", 1)} | batched | plain
    assert all(row["seconds_per_edit"] > 0 for row in rows)
    assert all(row["share_of_limit"] is None or 0 < row["share_of_limit"] < 1 for row in rows)
