"""Peak memory of a run of 50 edits in a process of its own, and whether it grows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row
from everedit.models import LanguageModel

SPARE_MIB = 1536
MOST_GROWTH = 0.02


def run_of_fifty(lm: LanguageModel) -> Iterator[Row]:
    """Peak resident memory against the model's float32 size plus 1.5 GiB, and growth from edit 10 to edit 50."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = ["--policy", "simie", "--set", "policy.start=base", "--edits", "50", "--checkpoints", "10"]
        command = [sys.executable, "-m", "everedit", "run", *flags, "--out", str(out), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((out / "summary.json").read_text())
    allowed = lm.parameters * 4 / 2**20 + SPARE_MIB
    peak, held = summary["peak_memory_mb"], summary["memory_mb"]
    yield Row("peak memory, 50 edits", allowed, peak, "MiB", allowed / peak, 1.0, "plain: float32 model + 1.5 GiB")
    growth = held["50"] / held["10"] - 1
    yield Row(
        "memory at edit 10, at edit 50", held["10"], held["50"], "MiB", (1 + MOST_GROWTH) / (1 + growth), 1.0,
        f"growth {growth:+.1%}, at most 2 %",
    )  # fmt: skip
