"""What the migration page shows of Python runs as written, with the file that it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from everedit.compat import classes
from everedit.compat.tables import ALGORITHMS
from tests.docs.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "migration.md"


@pytest.mark.real
def test_the_script_for_easyedit_runs_as_written(tmp_path: Path) -> None:
    [file], [code] = blocks(PAGE, "yaml"), blocks(PAGE, "python")
    name = file.partition("\n")[0].removeprefix("# ")
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(file, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rewrite_acc" in done.stdout
    assert "neighborhood_acc" in done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert ALGORITHMS[yaml.safe_load(file)["alg_name"]].method == "rome"


def test_the_pages_names_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = {key for algorithm in ALGORITHMS.values() for key in algorithm.table}
    rows = text.split("### Files of hyper-parameters")[1].split("### Metrics")[0].splitlines()
    theirs = [cell for line in rows if line.startswith("| ") for cell in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    named = [key.partition(":")[0] for key in theirs]
    assert len(named) > 30
    assert [key for key in named if key not in tables and key not in {"generate-text"}] == []
    for kind in re.findall(r"\b(\w+(?:HyperParams|Hparams))\b", text):
        assert hasattr(classes, kind)
