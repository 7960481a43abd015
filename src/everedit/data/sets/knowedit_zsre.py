"""knowedit-zsre: KnowEdit's ZsRE, with locality about the same subject and three kinds of portability."""

from __future__ import annotations

from everedit.data.sets._knowedit import part

SET = part(
    "KnowEdit's ZsRE: locality about the same subject, three kinds of portability",
    ("knowedit/zsre.jsonl", "zsre.jsonl", "ZsRE-test-all.json"),
    "ZsRE/ZsRE-test-all.json",
    notes="repeats most of ZsRE: never count the two as independent",
    subject_may_be_elsewhere=True,
)
