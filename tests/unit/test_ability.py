"""General ability: tasks by hand and on models that know what is asked; published faults; lm-eval's own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.errors import EditError, EvereditError, UnknownName
from everedit.evaluation import PROTOCOLS
from everedit.evaluation.ability import TASKS, Ability, AbilityConfig, _base
from everedit.evaluation.ability._base import Choice, chosen, macro_f1, written
from everedit.evaluation.ability.perplexity import detokenised, losses
from everedit.evaluation.ability.published import span_hits
from everedit.evaluation.ability.tasks import last_number
from everedit.evaluation.metrics import normalise_answer
from everedit.models import LanguageModel
from everedit.models.model import Speaker
from tests.support import facts, tiny
from tests.support.loading import fresh, shared

FACTS = facts.facts()


def write(folder: Path, file: str, records: list[dict[str, Any]]) -> None:
    place = folder / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


# --------------------------------------------------------------------------- choices


def choices(count: int = 20) -> list[Choice]:
    """Facts that the tiny models know, the right answer among all of its kind."""
    found = []
    for fact in FACTS[:count]:
        options = facts.ANSWERS[fact.relation]
        found.append(Choice(fact.prompt, options, options.index(fact.answer)))
    return found


def test_the_option_with_the_lowest_loss_is_chosen() -> None:
    lm = shared("llama")
    outcomes = chosen(lm, choices())
    for choice, outcome in zip(choices(), outcomes, strict=True):
        assert outcome is not None
        totals = []
        for option in choice.options:
            begun, ids = (lm.tokenizer(t).input_ids for t in (choice.prompt, f"{choice.prompt} {option}"))
            logs = lm.model(torch.tensor([ids])).logits[0, len(begun) - 1 : -1].float().log_softmax(-1)
            totals.append(float(logs.gather(1, torch.tensor(ids[len(begun) :])[:, None]).mean()))
        assert outcome.values["said"] == totals.index(max(totals))
        assert outcome.said == choice.options[totals.index(max(totals))]
    assert np.mean([outcome.values["accuracy"] for outcome in outcomes if outcome]) > 0.9
    too_long = Choice("a " * 300, ("b", "c"), 0)
    assert chosen(lm, [too_long, choices(1)[0]])[0] is None


def test_macro_f1_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    for classes in (2, 4):
        gold, said = random.integers(classes, size=(2, 3, 40)).astype(float)
        found = macro_f1(classes)({"gold": gold, "said": said})
        for row in range(3):
            assert found[row] == pytest.approx(f1_score(gold[row], said[row], average="macro"))
    # A model that says one thing always is near one half in accuracy, and not in F1.
    assert macro_f1(2)({"gold": np.array([[0, 1, 0, 1.0]]), "said": np.zeros((1, 4))}) == pytest.approx(1 / 3)


def test_examples_stand_before_the_prompt_and_are_not_asked_about(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path, "sst2.jsonl", [{"sentence": f"text {n} ", "label": n % 2} for n in range(40)])
    asked: list[Choice] = []
    monkeypatch.setattr("everedit.evaluation.ability.tasks.chosen", lambda lm, given: asked.extend(given) or [])
    list(Ability(AbilityConfig(tasks=("sst2",), path=tmp_path, limit=7)).measure(shared("gpt2")))
    assert len(asked) == 7
    assert asked[0].prompt.endswith("\n\nReview: text 10\nSentiment:")
    assert asked[0].prompt.startswith("Review: text 0\nSentiment: negative\n\nReview: text 1\nSentiment: positive\n\n")
    assert asked[0].prompt.count("Review:") == 5


RECORDS: dict[str, dict[str, Any]] = {
    "sst2@1": {"sentence": "good ", "label": 1},
    "sentiment@1": {"sentence": "good", "label": "1"},
    "mrpc@1": {"sentence1": "a", "sentence2": "b", "label": 0},
    "cola@1": {"sentence": "a b", "label": 1},
    "rte@1": {"sentence1": "a", "sentence2": "b", "label": 1},
    "nli@1": {"sentence1": "a", "sentence2": "b", "label": "not_entailment"},
    "mmlu@1": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2},
    "dialogue@1": {"article": "f : hi", "options": ["a", "b", "c", "d"], "answers": "C"},
    "piqa@1": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "reasoning@1": {"question": "q", "answer": "2 + 2 = 4\n#### 4"},
    "summarization@1": {"dialogue": "A: hi\r\nB: ho", "summary": "They greet."},
    "open-qa@1": {"question": "who?", "answer": ["Ida", "Ida Vane"]},
    "perplexity@1": {"text": "Well , it rained all day"},
    "me-ppl@1": {"text": "We had tea at noon"},
    "prune/reasoning@1": {"question": "q", "answer": "2 + 2 = 4\n#### 4"},
    "prune/summarization@1": {"dialogue": "A: hi", "summary": "They greet."},
    "prune/open-qa@1": {"question": "who?", "answer": ["Ida"], "passage": "Ida was here."},
    "prune/nli@1": {"sentence1": "a", "sentence2": "b", "label": "entailment"},
}


def test_every_task_reads_its_records_and_gives_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiny models have room for few tokens.
    monkeypatch.setattr("everedit.evaluation.ability.tasks._REASONING", 8)
    monkeypatch.setattr("everedit.evaluation.ability.tasks._SHOTS", 1)
    assert RECORDS.keys() == TASKS.keys()
    for name, task in TASKS.items():
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name, task.file, [RECORDS[name]] * (task.skip + 2))
        [found] = Ability(AbilityConfig(tasks=(name,), path=tmp_path / name)).measure(shared("gpt2"))
        assert (found.task, found.left_out) == (name, 0)
        assert found.examples >= 1
        assert found.figures.keys() == found.intervals.keys() == task.figures.keys()
        assert task.published == name.startswith("prune/")
        json.dumps(found.as_dict())


# --------------------------------------------------------------------------- free text


def test_texts_are_written_alike_in_any_company() -> None:
    lm = shared("llama")
    prompts = [fact.prompt for fact in FACTS[:8]] + ["Well, it rained all day. " * 3 + FACTS[9].rephrase, "a " * 300]
    together = written(lm, prompts, 6)
    assert together[-1] is None
    for prompt, text in zip(prompts[:-1], together, strict=False):
        assert text == lm.generate([prompt], max_new_tokens=6)[0] == written(lm, [prompt], 6)[0]
    assert written(lm, prompts[:1], 6, one_line=True) == [str(together[0]).strip().partition("\n")[0]]


class Says:
    """Lets a model write fixed texts, so that a task's own work can be looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, texts: list[str], module: str) -> None:
        self.asked: list[tuple[list[str], int]] = []

        def say(lm: Any, prompts: list[str], tokens: int, **how: Any) -> list[str | None]:
            self.asked.append((list(prompts), tokens))
            return [text.strip().partition("\n")[0] if how.get("one_line") else text for text in texts]

        monkeypatch.setattr(f"everedit.evaluation.ability.{module}.written", say)


def run(name: str, records: list[dict[str, Any]], folder: Path) -> _base.Measured:
    write(folder, TASKS[name].file, records)
    [found] = Ability(AbilityConfig(tasks=(name,), path=folder)).measure(shared("gpt2"))
    return found


def test_clean_reasoning_shows_no_solution_and_takes_the_last_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = ["First 3, then the total is $1,234.00.", "It is 7.\nQuestion: 1234", "none", "1234 apples, no, 12"]
    says = Says(monkeypatch, texts, "tasks")
    found = run(
        "reasoning@1", [{"question": f"How many{n}?", "answer": "hidden <<1>>\n#### 1,234"} for n in range(4)], tmp_path
    )
    assert [outcome.values["accuracy"] for outcome in found.outcomes] == [1.0, 0.0, 0.0, 0.0]
    assert "hidden" not in "".join(says.asked[0][0])
    assert [last_number(text) for text in ("-3.5 or", "2,000 m", "no")] == [-3.5, 2000.0, None]


def test_clean_question_answering_counts_an_example_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Says(monkeypatch, [" the Ida Vane.", " I think Ida Vane it is", " Ivan", "\nIda\nQuestion: next"], "tasks")
    found = run("open-qa@1", [{"question": f"who {n}", "answer": ["Ida Vane", "Ida"]} for n in range(4)], tmp_path)
    assert [outcome.values["exact_match"] for outcome in found.outcomes] == [1.0, 0.0, 0.0, 1.0]
    assert [outcome.values["contains"] for outcome in found.outcomes] == [1.0, 1.0, 0.0, 1.0]


def test_clean_summaries_keep_their_end_and_published_ones_lose_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = [{"dialogue": "A: hi\r\nB: ho", "summary": "Both of them greet"}]
    Says(monkeypatch, [" Both of them greet\nA: more"], "tasks")
    assert run("summarization@1", records, tmp_path).figures["rouge"] == pytest.approx(1.0)
    says = Says(monkeypatch, [" Both of them greet"], "published")
    found = run("prune/summarization@1", records, tmp_path)
    assert says.asked[0][1] == 25
    assert found.outcomes[0].said == " Both "
    assert found.figures["rouge"] == pytest.approx((0.4 + 0 + 0.4) / 3)
    Says(monkeypatch, [" short"], "published")
    assert run("prune/summarization@1", records, tmp_path).figures["rouge"] == 0.0


def test_published_reasoning_has_the_solution_in_its_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says = Says(monkeypatch, [" 142.", " 4"], "published")
    found = run("prune/reasoning@1", [{"question": "q", "answer": "6 * 7 = 42\n#### 42"}] * 2, tmp_path)
    assert all("6 * 7 = 42" in prompt for prompt in says.asked[0][0])
    # A substring counts: 42 is in 142.
    assert [outcome.values["accuracy"] for outcome in found.outcomes] == [1.0, 0.0]


def test_published_inference_leaves_out_what_is_not_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = [{"sentence1": str(n), "sentence2": "b", "label": label} for n, label in enumerate(
        ("entailment", "not_entailment", "entailment", "not_entailment")
    )]  # fmt: skip
    Says(monkeypatch, [" True", " true", " maybe", " maybe"], "published")
    found = run("prune/nli@1", records, tmp_path)
    assert (found.figures["accuracy_of_valid"], found.figures["accuracy"], found.figures["valid"]) == (0.5, 0.25, 0.5)
    Says(monkeypatch, ["x"] * 4, "published")
    collapsed = run("prune/nli@1", records, tmp_path).figures
    assert (collapsed["accuracy_of_valid"], collapsed["accuracy"]) == (None, 0.0)


def test_published_question_answering_counts_an_example_several_times() -> None:
    def hits(text: str, answers: list[str], flag: bool = False) -> tuple[int, bool]:
        return span_hits(normalise_answer(text).split(" "), {normalise_answer(answer) for answer in answers}, flag)

    assert hits("Ida was here", ["Ida"]) == (1, False)
    # Twice in the middle, and twice it counts.
    assert hits("he said Ida and Ida again", ["Ida"]) == (2, False)
    # The first longer span sets a flag that is never taken back …
    assert hits("he said Ida Vane came", ["Ida Vane"]) == (1, True)
    # … with which the search ends behind the first word that is no answer.
    assert hits("he said Ida Vane came", ["Ida Vane"], flag=True) == (0, True)
    assert hits("nothing at all", ["Ida"]) == (0, False)


# --------------------------------------------------------------------------- perplexity


def test_perplexity_is_that_of_the_plain_formula(tmp_path: Path) -> None:
    lm = shared("gemma2")
    texts = ["Well, it rained all day. " * 20, "Mira Lanner lives in the city of Cairo.", "tea"]
    expected = []
    for text in texts:
        ids = lm.tokenizer(text).input_ids
        total, count = 0.0, 0
        for start in range(0, len(ids), 128):
            part = torch.tensor(ids[start : start + 128])
            if len(part) > 1:
                logs = lm.model(part[None]).logits[0, :-1].float().log_softmax(-1)
                total -= float(logs.gather(1, part[1:, None]).sum())
                count += len(part) - 1
        expected.append((total, count))
    assert len(lm.tokenizer(texts[0]).input_ids) > lm.context_tokens == 128
    for found, wanted in zip(losses(lm, texts), expected, strict=True):
        assert found == (pytest.approx(wanted[0], rel=1e-4), wanted[1])
    write(tmp_path, "me_ppl.jsonl", [{"text": text} for text in texts])
    [found] = Ability(AbilityConfig(tasks=("me-ppl",), path=tmp_path)).measure(lm)
    total, count = (sum(column) for column in zip(*expected, strict=True))
    assert found.figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    middle = sorted(loss / count for loss, count in expected)[1]
    assert found.figures["perplexity_median"] == pytest.approx(math.exp(middle), rel=1e-4)


def test_a_text_of_the_users_own_is_read_paragraph_by_paragraph(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("One day.\n\n\nAnother day,\nwith rain.\n", encoding="utf-8")
    [found] = Ability(AbilityConfig(text=tmp_path / "own.txt")).measure(shared("gpt2"))
    assert (found.task, found.examples) == ("text@1", 2)
    with pytest.raises(EditError, match="cannot read the text"):
        Ability(AbilityConfig(text=tmp_path / "none.txt"))


def test_wikitext_is_put_back_into_ordinary_spelling() -> None:
    tokenised = "In 1990 @-@ 91 , about 2 @,@ 000 ( 3 @.@ 5 % ) did n't ; Boulter 's role was cut !"
    assert detokenised(tokenised) == "In 1990-91, about 2,000 (3.5%) didn't; Boulter's role was cut!"


# --------------------------------------------------------------------------- bad input


def test_unknown_tasks_and_missing_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean reasoning@1"):
        Ability(AbilityConfig(tasks=("reasonin",), path=tmp_path))
    with pytest.raises(EditError, match="needs its records"):
        Ability(AbilityConfig(tasks=("nli",)))
    with pytest.raises(EditError, match="is not there") as caught:
        Ability(AbilityConfig(tasks=("nli",), path=tmp_path))
    assert "rte_train.jsonl" in caught.value.fix
    (tmp_path / "rte_train.jsonl").write_text("{\n")
    with pytest.raises(EditError, match="cannot read the records"):
        Ability(AbilityConfig(tasks=("nli",), path=tmp_path))


def test_the_command_shows_and_saves_what_was_asked_and_said(tmp_path: Path) -> None:
    write(tmp_path, "piqa_valid.jsonl", [RECORDS["piqa@1"]] * 3)
    words = ["ability", "run", "--model", str(tiny.trained("gpt2")), "--path", str(tmp_path), "--device", "cpu"]
    out = ["--limit", "2", "--out", str(tmp_path / "o.jsonl"), "--json"]
    done = CliRunner().invoke(app, [*words, "--task", "piqa", *out])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["tasks"]["piqa@1"]
    assert (found["examples"], list(found["figures"])) == (2, ["accuracy", "f1"])
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["piqa@1"] * 2
    assert all(row["said"] in ("a", "b") for row in rows)
    assert "piqa@1" in CliRunner().invoke(app, [*words, "--task", "piqa", "--limit", "1"]).stdout
    for bad in ([], ["--task", "nothing"], ["--task", "nli"]):
        assert CliRunner().invoke(app, [*words, *bad]).exit_code == 1
    assert json.loads(CliRunner().invoke(app, ["ability", "ls", "--json"]).stdout).keys() == TASKS.keys()
    listed = json.loads(CliRunner().invoke(app, ["protocols", "ls", "--json"]).stdout)
    assert listed.keys() == PROTOCOLS.keys()
    assert listed["rome/counterfact@1"]["data"] == ["counterfact", "counterfact-full"]


# --------------------------------------------------------------------------- lm-eval

pytest.importorskip("lm_eval")


def theirs(lm: LanguageModel) -> Any:
    from lm_eval.models.huggingface import HFLM

    backend = "causal" if lm.layout.is_decoder_only else "seq2seq"
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, backend=backend, batch_size=1)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "t5"])
def test_what_lm_eval_hears_is_what_its_own_models_say(family: str) -> None:
    from everedit.evaluation.ability.harness import harness_model

    lm = shared(family)
    own, oracle = harness_model(lm), theirs(lm)
    pairs = [(fact.prompt, f" {fact.answer}") for fact in FACTS[:5]]
    pairs += [(f"{FACTS[6].prompt} ", FACTS[6].answer), ("", "Well, it rained"), ("No space:", "here")]
    pairs += [("a " * 140 + FACTS[7].prompt, f" {FACTS[7].answer}")]
    # An encoder reads its end token here also behind an empty context and one that was cut.
    requests = instances("loglikelihood", pairs if family != "t5" else pairs[:6])
    for found, expected in zip(own.loglikelihood(requests), oracle.loglikelihood(requests), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=2e-3)
        assert found[1] == expected[1]
    if family == "t5":
        return
    texts = instances("loglikelihood_rolling", [("Well, it rained all day. " * 15,), ("One day",)])
    for found, expected in zip(own.loglikelihood_rolling(texts), oracle.loglikelihood_rolling(texts), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    settings = {"until": ["\n", "."], "max_gen_toks": 6, "do_sample": False}
    wanted = instances("generate_until", [(fact.prompt, settings) for fact in FACTS[:4]])
    assert own.generate_until(wanted) == oracle.generate_until(wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_memory_that_rewrites_prompts_answers_lm_eval_too() -> None:
    from everedit.evaluation.ability.harness import harness_model

    lm = fresh("gpt2")
    asked, other = FACTS[0], FACTS[3]
    lm.redirect = lambda prompts, room: [Speaker(lm, other.prompt) for _ in prompts]
    requests = instances("loglikelihood", [(asked.prompt, f" {other.answer}"), (asked.prompt, f" {asked.answer}")])
    rewritten = instances("loglikelihood", [(other.prompt, f" {other.answer}"), (other.prompt, f" {asked.answer}")])
    found = harness_model(lm).loglikelihood(requests)
    for one, expected in zip(found, theirs(shared("gpt2")).loglikelihood(rewritten), strict=True):
        assert one == (pytest.approx(expected[0], abs=2e-3), expected[1])
    settings = {"until": ["."], "max_gen_toks": 6}
    [text] = harness_model(lm).generate_until(instances("generate_until", [(asked.prompt, settings)]))
    assert text.strip() == other.answer
    with pytest.raises(EvereditError, match="draws its texts at random"):
        harness_model(lm).generate_until(instances("generate_until", [("a", {"do_sample": True})]))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{right}}}}"
doc_to_choice: "{{{{options}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [{"prompt": c.prompt, "options": list(c.options), "right": c.right} for c in choices(12)]
    write(tmp_path, "facts.jsonl", records)
    (tmp_path / "facts.yaml").write_text(TASK.format(name="tiny_facts", file=tmp_path / "facts.jsonl"))
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_task_of_lm_eval_runs_on_the_model_in_memory_edits_and_all(folder: Path) -> None:
    lm = fresh("llama")
    ability = Ability(AbilityConfig(lm_eval=("tiny_facts",), include_path=folder, limit=10))
    assert ability.names == ["tiny_facts"]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    [found] = ability.measure(lm)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (found.task, found.examples) == ("lm-eval/tiny_facts@3.0", 10)
    known = found.figures["acc"]
    assert known is not None
    assert known > 0.8
    interval = found.intervals["acc"]
    assert interval is None or interval[0] <= known <= interval[1]
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.neg_()
    [broken] = ability.measure(lm)
    assert broken.figures["acc"] is not None
    assert broken.figures["acc"] < known


def test_lm_eval_names_are_checked_before_anything_runs(folder: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean hellaswag"):
        Ability(AbilityConfig(lm_eval=("hellaswagg",)))
    (folder / "facts.jsonl").unlink()
    with pytest.raises(EvereditError, match="data of an lm-eval task cannot be had"):
        Ability(AbilityConfig(lm_eval=("tiny_facts",), include_path=folder))
