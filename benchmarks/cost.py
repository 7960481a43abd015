"""Seconds an edit and peak memory of one method, in a process that does nothing else; prints JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.results import load_records, make_editor
from everedit.models import load_model
from everedit.models.memory import peak_memory_mb, resident_mb

EDITS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", required=True)
    options = parser.parse_args()
    editor = make_editor(load_model(options.model, dtype="float32"), options.data, options.method)
    edits = load_records(options.data, "zsre", EDITS + 1)
    # The first edit also reads the statistics and makes what is made once.
    with editor.trial(edits[0], score=False):
        pass
    before, seconds = resident_mb(), []
    for edit in edits[1:]:
        start = time.perf_counter()
        with editor.trial(edit, score=False):
            seconds.append(time.perf_counter() - start)
    row = {"method": options.method, "edits": EDITS, "seconds": statistics.median(seconds)}
    print(json.dumps({**row, "resident_mb": before, "peak_mb": peak_memory_mb()}))


if __name__ == "__main__":
    main()
