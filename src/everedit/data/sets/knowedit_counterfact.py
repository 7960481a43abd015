"""knowedit-counterfact: KnowEdit's WikiData counterfactuals, answers as lists of alias lists."""

from __future__ import annotations

from everedit.data.sets._knowedit import part

SET = part(
    "KnowEdit's WikiData counterfactuals",
    ("knowedit/wiki_counterfact.jsonl", "wiki_counterfact.jsonl", "test_cf.json", "train_cf.json"),
    "wiki_counterfact/test_cf.json",
)
