"""knowedit-recent: KnowEdit's recently changed WikiData facts: knowledge to insert, with no old answer."""

from __future__ import annotations

from everedit.data.sets._knowedit import part

SET = part(
    "KnowEdit's recent WikiData facts, to be inserted",
    ("knowedit/wiki_recent.jsonl", "wiki_recent.jsonl", "recent_test.json", "recent_train.json"),
    "wiki_recent/recent_test.json",
    notes="no ground_truth: what is edited in was not known",
)
