"""counterfact-full: CounterFact as ROME and MEMIT publish it, with all probes; also MultiCounterFact."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import named, one_hop, rewrite


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit with every kind of probe that the record has."""
    request = record["requested_rewrite"]
    fields = {**named(record, "id" if "id" in record else "case_id"), **rewrite(request)}
    new, true = fields["target_new"], fields["ground_truth"]
    unrelated = record.get("unrelated_relation")
    other = record.get("alternative_subject")
    kinds = (("neighborhood_prompts", true, "neighborhood"), ("attribute_prompts", new, "attribute"),
             ("distracting_neighborhood_prompts", true, "distracting_neighborhood"))  # fmt: skip
    locality = [probe(text, answer, kind) for key, answer, kind in kinds for text in record.get(key) or ()]
    if unrelated:
        locality.append(probe(unrelated["question"], unrelated["object"], "same_subject"))
    return {
        **fields,
        "question": record.get("qna_question"),
        "rephrase": record.get("paraphrase_prompts") or [],
        "generation": record.get("generation_prompts") or [],
        "locality": locality,
        "portability": [
            *one_hop(record.get("portability")),
            *([probe(request["prompt"].replace("{}", other), new, "alias")] if other else []),
        ],
        "tags": ["toxicity_flash"] if record.get("wilke_toxicity_flash") else [],
    }


SET = DataSet(
    "CounterFact in ROME's own form: 2 paraphrases, 10 neighbours, 10 generation prompts",
    licence="MIT",
    convert=convert,
    protocols=("rome/counterfact@1", "rome/generation@1", "wise/lifelong@1", "knowedit/portability@1"),
    files=("counterfact_full/edit.jsonl", "edit.jsonl", "counterfact.json", "multi_counterfact.json"),
    hub="azhx/counterfact/data/test-*.parquet",
    paper="Meng et al. 2022",
    notes="paraphrases begin with unrelated text, some of it over several lines; the tag toxicity_flash is WilKE's",
)
