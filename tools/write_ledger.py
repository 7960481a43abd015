"""Write the small ledger that tests open for ever after: ``python -m tools.write_ledger tests/ledgers/vN``.

Run once for each version of the schema, by that version, and never again: a ledger that was written today is no proof
that one of last year can still be opened.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

import torch

from everedit.edit import Edit
from everedit.ledger.steps import hashes_of
from everedit.living import LivingModel
from tests.support.steady import steady_model

TOWNS = {"Norn": "Oslo", "Alta": "Lima", "Bele": "Cairo", "Cori": "Kyoto"}
TARGET = {"steps": 10, "weight_decay": 0.0, "clamp": 10.0, "kl": 0.0}
SETTINGS = {"layers": [1], "moment_weight": 0.01, "contexts": [], "target": TARGET}


def main(out: Path) -> None:
    """Make four edits, take one out by algebra, undo the last, refuse one; pack the folder small."""
    torch.set_num_threads(1)
    edits = [
        Edit(prompt=f"the town of {town} lies in", subject=town, target_new=target) for town, target in TOWNS.items()
    ]
    gates = {"took": None, "perplexity": None, "norm": None, "lost": None}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EVEREDIT_CACHE"] = f"{scratch}/cache"
        folder = Path(scratch) / "ledger"
        living = LivingModel.create(
            folder, method="memit", policy="simie", lm=steady_model(), method_settings=SETTINGS,
            policy_settings={"lam": 0.1, "start": "base"}, stats={"tokens": 512, "window_tokens": 16}, gates=gates,
            conflicts={"near_key": None},
        )  # fmt: skip
        expected = {"base": hashes_of(living.editor.state())}

        def note() -> None:
            expected[living.head] = hashes_of(living.editor.state())

        for edit in edits[:3]:
            living.edit(edit, by="dana", source="https://example.org/towns", until="2030-12-31")
            note()
        [aside] = living.add(
            [Edit(prompt=edits[0].prompt, subject="Norn", target_new="Kyoto")], by="erin", again=True
        ).set_aside
        assert aside.why == "conflict"
        living.forget(edits[1].id, by="erin")
        note()
        living.edit(edits[3], by="erin")
        note()
        living.undo(by="erin")
        living.close()
        out.mkdir(parents=True)
        shutil.copytree(folder / "blobs", out / "blobs")
        for name in ("config.yaml", "head"):
            shutil.copy(folder / name, out / name)
        # Pages of 4 KB for a dozen almost empty tables are most of the file.
        packed = sqlite3.connect(folder / "ledger.db")
        packed.execute("PRAGMA journal_mode = DELETE")
        packed.execute("PRAGMA page_size = 512")
        packed.execute(f"VACUUM INTO '{out / 'ledger.db'}'")
        packed.close()
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
