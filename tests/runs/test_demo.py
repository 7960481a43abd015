"""``everedit demo``, as a newcomer runs it, on the real model: once from nothing, then again with what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def demo(folder: Path) -> tuple[str, dict[str, Any], Path]:
    command = [sys.executable, "-m", "everedit", "demo", "--edits", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    run = max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return done.stdout, json.loads((run / "summary.json").read_text()), run


@pytest.mark.real
def test_the_demo_edits_shows_and_reports_and_the_second_time_gathers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    # The converted model is kept where other tests keep it; the statistics are this test's own.
    from everedit.cache import cache_root

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(cache_root() / "models")
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "cache"))
    said, summary, run = demo(tmp_path)
    for heading in ("unedited", "after each edit", "retained after 2", "Seconds per edit", "Free answers"):
        assert heading in said
    assert str((run / "report.html").resolve()) in said.replace("\n", "")
    assert (run / "report.html").stat().st_size > 10_000
    scores = summary["protocols"]["teacher-forced/token-accuracy@1"]
    assert scores["checkpoints"]["2"]["immediate"]["reliability"] > scores["unedited"]["reliability"]
    assert summary["seconds_before"]["statistics"] > 2
    again, kept, other = demo(tmp_path)
    assert other != run
    assert "Free answers" in again
    assert kept["protocols"] == summary["protocols"]
    assert kept["seconds_before"]["statistics"] < 2
