"""The protocols of the papers: each by hand on a table of answers, and on real models against one prompt at a time."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.errors import EditError, EvereditError, NotApplicable, TokenError
from everedit.evaluation import (
    PROTOCOLS,
    Baseline,
    EndpointJudge,
    Evaluator,
    JudgeConfig,
    References,
)
from everedit.evaluation.contexts import asked_in
from everedit.evaluation.evaluate import average
from everedit.evaluation.protocols import Answers
from everedit.evaluation.read import Reading
from everedit.models import LanguageModel
from tests.support import facts
from tests.support.editing import make_editor
from tests.support.loading import edit_of, fresh, probe_of, shared
from tests.support.running import full_edit

ROME, TEXT, MEMIT, LIFELONG = "rome/counterfact@1", "rome/generation@1", "memit/zsre@1", "wise/lifelong@1"
BIOGRAPHY, TEMPORAL = "wise/hallucination@1", "wise/temporal@1"
PORTABLE, HOPS = "knowedit/portability@1", "mquake/multi-hop@1"
WILD, INSTRUCTED, CHAT, JUDGED = "wild/question@1", "wild/instruction@1", "wild/chat@1", "wild/judged@1"

EDIT = Edit.parse(
    {
        "prompt": "The capital of Peru is",
        "subject": "Peru",
        "target_new": "Cusco",
        "target_aliases": ["Cuzco"],
        "ground_truth": "Lima",
        "question": "What is the capital of Peru?",
        "rephrase": ["Peru is governed from", "Peru's seat of government is"],
        "locality": [
            {"prompt": "The capital of Chile is", "answer": "Santiago", "kind": "neighborhood"},
            {"prompt": "The capital of Bolivia is", "answer": "Sucre", "kind": "neighborhood"},
            {"prompt": "An old city of the Incas is", "answer": "Cusco", "kind": "attribute"},
        ],
        "portability": [
            {"prompt": "Peru's mayor sits in", "answer": "Cusco", "kind": "alias"},
            {
                "prompt": "Where was the founder of Peru's capital born?",
                "answer": "Tampu",
                "aliases": ["Pacaritambo"],
                "kind": "multi_hop",
                "case": "1",
                "needs": [{"prompt": "Who founded Cusco?", "answer": "Manco"}],
            },
            {"prompt": "Peru's capital's founder: born where?", "answer": "Tampu", "kind": "multi_hop", "case": "1"},
            {"prompt": "Who rules where Peru's capital is?", "answer": "Inca", "kind": "multi_hop", "case": "2"},
        ],
        "generation": ["Peru is a country that"],
        "held_out": "Peru moved its capital to Cusco.",
    }
)


def heard(protocol: str, nll: dict[Any, float] | None = None, said: dict[str, str] | None = None) -> Answers:
    """What a model says that gives targets these losses (5 otherwise) and these texts behind prompts ("?" otherwise).

    A loss below 1 stands for a target of two tokens that are the model's choices; between 1 and 2 only the first is.
    """
    asks = PROTOCOLS[protocol].asks(EDIT)
    readings = {}
    for pair in asks.read:
        loss = (nll or {}).get(pair, 5.0)
        readings[pair] = Reading((1, 2), (1, 2) if loss < 1 else (1, 0) if loss < 2 else (0, 0), loss)
    open_texts = {(context, prompt): (said or {}).get(prompt, "?") for context, prompt in asks.open}
    return Answers(readings, {}, open_texts, dict.fromkeys(asks.sample, " a b a b a"))


def scored(protocol: str, now: Answers, base: Answers | None = None) -> dict[str, float | None]:
    return PROTOCOLS[protocol].score(EDIT, now, base or now)


# --------------------------------------------------------------------------- by hand


def test_rome_compares_probabilities_and_leaves_out_probes_of_other_kinds() -> None:
    nll = {
        (EDIT.prompt, "Cusco"): 0.5, (EDIT.prompt, "Lima"): 1.5,
        (EDIT.rephrase[0], "Cusco"): 2.0, (EDIT.rephrase[0], "Lima"): 2.0,  # equal is not better
        (EDIT.rephrase[1], "Cusco"): 1.0, (EDIT.rephrase[1], "Lima"): 3.0,
        ("The capital of Chile is", "Santiago"): 0.1, ("The capital of Chile is", "Cusco"): 2.0,
        ("The capital of Bolivia is", "Sucre"): 4.0, ("The capital of Bolivia is", "Cusco"): 1.0,
    }  # fmt: skip
    now = heard(ROME, nll)
    assert ("An old city of the Incas is", "Cusco") not in now.readings
    found = scored(ROME, now)
    e = math.exp
    assert found == pytest.approx(
        {"ES": 1.0, "PS": 0.5, "NS": 0.5, "EM": e(-0.5) - e(-1.5), "PM": (e(-1) - e(-3)) / 2,
         "NM": (e(-0.1) - e(-2) + e(-4) - e(-1)) / 2}
    )  # fmt: skip
    summary = PROTOCOLS[ROME].summary([found])
    assert summary["S"] == pytest.approx(3 / (1 + 2 + 2))
    assert list(summary) == ["ES", "PS", "NS", "EM", "PM", "NM", "S"]
    # The score is the harmonic mean of the means, not the mean of harmonic means.
    other = {**found, "ES": 0.0, "PS": 1.0, "NS": 1.0}
    assert PROTOCOLS[ROME].summary([found, other])["S"] == pytest.approx(3 / (2 + 4 / 3 + 4 / 3))


def test_the_unedited_model_prefers_what_is_true() -> None:
    true = {(prompt, "Lima"): 0.1 for prompt in (EDIT.prompt, *EDIT.rephrase)}
    true |= {(probe.prompt, probe.answer): 0.1 for probe in EDIT.locality}
    found = scored(ROME, heard(ROME, true))
    assert (found["ES"], found["PS"], found["NS"]) == (0.0, 0.0, 1.0)
    without = EDIT.model_copy(update={"ground_truth": None})
    bare = PROTOCOLS[ROME].score(without, heard(ROME, true), Answers({}, {}))
    assert (bare["ES"], bare["PS"], bare["NS"]) == (None, None, 1.0)


def test_memits_zsre_measures_against_the_gold_answer_and_wises_against_the_model_itself() -> None:
    half = {(EDIT.prompt, "Cusco"): 1.5, (EDIT.rephrase[0], "Cusco"): 0.5, ("The capital of Chile is", "Santiago"): 1.5}
    found = scored(MEMIT, heard(MEMIT, half))
    assert found == {"efficacy": 0.5, "paraphrase": 0.5, "specificity": pytest.approx(0.5 / 3)}
    assert PROTOCOLS[MEMIT].summary([found])["S"] == pytest.approx(3 / (2 + 2 + 6))
    now = heard(LIFELONG, half)
    # One rephrasing, one locality probe; right or wrong, the unedited model's choices are what counts.
    assert len(now.readings) == 3
    unedited = scored(LIFELONG, now)
    assert unedited == {"reliability": 0.5, "generalization": 1.0, "locality": 1.0}
    assert scored(LIFELONG, now, heard(LIFELONG))["locality"] == 0.5
    assert PROTOCOLS[LIFELONG].summary([unedited])["average"] == pytest.approx(2.5 / 3)


def test_hallucination_is_a_perplexity_with_mean_and_median() -> None:
    now = heard(BIOGRAPHY, {(EDIT.prompt, "Cusco"): math.log(9)})
    assert scored(BIOGRAPHY, now) == {"perplexity": pytest.approx(9.0), "locality": 1.0}
    many = [{"perplexity": value, "locality": 1.0} for value in (2.0, 4.0, 3000.0)]
    assert PROTOCOLS[BIOGRAPHY].summary(many) == {"perplexity": 1002.0, "locality": 1.0, "perplexity_median": 4.0}
    # A loss beyond what a float can raise is a very large number and no error.
    assert scored(BIOGRAPHY, heard(BIOGRAPHY, {(EDIT.prompt, "Cusco"): 1e6}))["perplexity"] > 1e300


def test_temporal_asks_whether_the_held_out_text_became_likely() -> None:
    text = ("Peru", "moved its capital to Cusco.")
    for loss, success in ((0.22, 1.0), (0.23, 0.0)):  # -log 0.8 = 0.2231
        found = scored(TEMPORAL, heard(TEMPORAL, {text: loss}))
        assert (found["held_out"], found["held_out_loss"]) == (success, loss)
    bare = PROTOCOLS[TEMPORAL].score(EDIT.model_copy(update={"held_out": None}), heard(TEMPORAL), heard(TEMPORAL))
    assert bare["held_out"] is None


def test_portability_is_by_kind_and_under_the_condition_that_the_rest_is_known() -> None:
    hop = EDIT.portability[1]
    nll = {(hop.prompt, "Tampu"): 0.5, (EDIT.portability[0].prompt, "Cusco"): 1.5}
    now = heard(PORTABLE, nll)
    known = heard(PORTABLE, {("Who founded Cusco?", "Manco"): 0.5})
    found = scored(PORTABLE, now, known)
    assert (found["alias"], found["multi_hop"], found["portability"]) == (0.5, pytest.approx(1 / 3), 0.375)
    assert (found["one_hop"], found["inverse"]) == (None, None)
    assert found["portability_known"] == 1.0
    assert scored(PORTABLE, now, heard(PORTABLE))["portability_known"] is None


def test_one_right_answer_of_a_case_is_enough_for_multi_hop() -> None:
    said = {EDIT.portability[1].prompt: " Pacaritambo", EDIT.prompt: " Cuzco", "Who founded Cusco?": " Manco"}
    found = scored(HOPS, heard(HOPS, said=said))
    assert found == {"multi_hop": 0.5, "every_question": 0.25, "multi_hop_known": 1.0, "reliability": 1.0}


@pytest.mark.parametrize("protocol", [WILD, INSTRUCTED, CHAT])
def test_free_text_counts_up_to_its_natural_stop_with_every_alias(protocol: str) -> None:
    asked = EDIT.prompt if protocol == WILD else EDIT.question
    for text, right in (
        (" Cusco", 1.0), (" the Cuzco!", 1.0), (" cusco.", 1.0), (" Cusco\nand more", 1.0),
        (" Cusco, a city", 0.0), (" Cusco Cusco Cusco", 0.0), ("", 0.0), (" Lima", 0.0),
    ):  # fmt: skip
        assert scored(protocol, heard(protocol, said={asked: text}))["reliability"] == right, text
    now = heard(protocol, said={EDIT.rephrase[0]: " Cuzco", EDIT.locality[0].prompt: " Santiago"})
    found = scored(protocol, now, heard(protocol))
    assert (found["generalization"], found["locality"], found["portability"]) == (0.5, pytest.approx(2 / 3), 0.0)
    assert scored(protocol, now)["locality"] == 1.0


def test_a_target_repeated_forever_is_right_token_by_token_and_wrong_freely() -> None:
    forever = " Cusco" * 40
    tokens = heard(LIFELONG, {(EDIT.prompt, "Cusco"): 0.1})
    assert scored(LIFELONG, tokens)["reliability"] == 1.0
    assert scored(WILD, heard(WILD, said={EDIT.prompt: forever}))["reliability"] == 0.0


def test_every_protocol_names_its_figures_and_none_shares_a_name() -> None:
    assert len({protocol.name for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        assert len(protocol.explanation) > 20
        now = heard(name)
        now.texts = dict.fromkeys(protocol.asks(EDIT).write, "?")
        now.verdicts = {(prompt, answer, "?"): False for _, prompt, answer in protocol.asks(EDIT).judge}
        found = protocol.score(EDIT, now, now)
        assert list(found) == list(protocol.metrics)
        assert list(protocol.summary([found])) == list(protocol.columns)
        bare = Edit(prompt="a b", target_new="c")
        asks = protocol.asks(bare)
        empty = Answers(
            {pair: Reading((1,), (0,), 2.0) for pair in asks.read},
            dict.fromkeys(asks.write, ""), dict.fromkeys(asks.open, ""),
            verdicts={(prompt, answer, ""): False for _, prompt, answer in asks.judge},
        )  # fmt: skip
        # A record with no probe at all has a score nowhere that is not its own.
        assert protocol.score(bare, empty, empty).keys() == found.keys()


# --------------------------------------------------------------------------- on real models


def rich_edit(person: int) -> Edit:
    """An edit of a tiny model's fact with everything that any protocol asks for."""
    fact, other = facts.facts()[3 * person], facts.facts()[3 * person + 6]
    multi = {"prompt": other.rephrase, "answer": other.answer, "kind": "multi_hop", "case": "c"}
    return edit_of(
        fact,
        ground_truth=fact.answer,
        question=f"Where does {fact.subject} live?",
        locality=tuple(probe_of(facts.facts()[3 * person + step]) for step in (9, 12)),
        portability=({**multi, "needs": [probe_of(other)]}, {**multi, "prompt": other.prompt}),
        generation=(f"{fact.subject} was seen", f"Every day {fact.subject}"),
        held_out=f"{fact.subject} lives in the city of {fact.answer}.",
    )


class Plain:
    """One text at a time through the whole model, all logits."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.lm.model(torch.tensor([ids]), use_cache=False).logits[0].float()

    def nll(self, prompt: str, target: str) -> float:
        begun, ids = (self.lm.tokenizer(text).input_ids for text in (prompt, f"{prompt} {target}"))
        return float(F.cross_entropy(self.logits(ids)[len(begun) - 1 : -1], torch.tensor(ids[len(begun) :])))

    def write(self, prompt: str) -> str:
        ids, new = self.lm.tokenizer(prompt).input_ids, []
        while len(new) < 50:
            new.append(int(self.logits([*ids, *new])[-1].argmax()))
            text = self.lm.tokenizer.decode(new[-1:])
            if new[-1] == self.lm.tokenizer.eos_token_id or text.endswith(".") or "\n" in text:
                break
        return str(self.lm.tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_batches_hear_what_single_prompts_hear(family: str) -> None:
    lm, edits = shared(family), [rich_edit(person) for person in (0, 3, 8)]
    chosen = [ROME, LIFELONG, BIOGRAPHY, TEMPORAL, PORTABLE, HOPS, WILD, INSTRUCTED]
    evaluator, plain = Evaluator(lm, chosen), Plain(lm)
    found = evaluator.answers(edits, Baseline.empty())
    for (prompt, target), reading in found.readings.items():
        assert reading.nll == pytest.approx(plain.nll(prompt, target), abs=2e-4)
    for (context, prompt), text in found.open.items():
        assert text == plain.write(asked_in(lm, context, prompt))
    assert len({len(text) for text in found.open.values()}) > 3
    # What a baseline already knows is a guess that changes nothing.
    assert evaluator.answers(edits, Baseline(found)) == found
    one_by_one = [evaluator.answers([edit], Baseline.empty()) for edit in edits]
    for edit, alone in zip(edits, one_by_one, strict=True):
        assert alone.open == {pair: found.open[pair] for pair in alone.open}
        [scores] = evaluator.score_answers([edit], alone, Baseline(alone))
        [together] = evaluator.score_answers([edit], found, Baseline(found))
        for name in chosen:
            for metric, value in together.scores[name].items():
                expected = None if value is None else pytest.approx(value, rel=1e-4)
                assert scores.scores[name][metric] == expected, (name, metric)


def test_the_unedited_model_has_locality_one_everywhere_it_is_measured_against_itself() -> None:
    lm, edits = shared("llama"), [rich_edit(person) for person in (0, 3)]
    evaluator = Evaluator(lm, [LIFELONG, BIOGRAPHY, TEMPORAL, WILD, INSTRUCTED])
    summary = average(evaluator.score(edits, evaluator.baseline(edits)))
    assert {name: scores["locality"] for name, scores in summary.items()} == dict.fromkeys(summary, 1.0)


@pytest.mark.usefixtures("own_cache")
def test_an_edit_moves_the_papers_scores(corpus_path: Path) -> None:
    editor, edit = make_editor("gpt2", corpus_path, "rome"), full_edit(0)
    edit = edit.model_copy(update={"locality": edit.locality[:1]})
    evaluator = Evaluator(editor.lm, [ROME, LIFELONG, BIOGRAPHY, WILD])
    baseline = evaluator.baseline([edit])
    [before] = evaluator.score([edit], baseline)
    with editor.trial(edit, score=False):
        [after] = evaluator.score([edit], baseline)
    # A person's home town is said after "is"; behind the bare name the model first wants that "is".
    assert before.scores[ROME]["EM"] < 0.2 < after.scores[ROME]["EM"]
    assert (before.scores[LIFELONG]["reliability"], after.scores[LIFELONG]["reliability"]) == (0.0, 1.0)
    assert before.scores[BIOGRAPHY]["perplexity"] > 10 > 2 > after.scores[BIOGRAPHY]["perplexity"]
    assert after.samples[0]["context"] == "question"


def test_sampled_texts_depend_on_their_prompt_and_the_seed_alone() -> None:
    lm, edits = shared("gpt2"), [rich_edit(person) for person in (0, 3)]
    evaluator = Evaluator(lm, [TEXT], seed=1)
    together = evaluator.answers(edits, Baseline.empty()).samples
    for edit in edits:
        for prompt, text in evaluator.answers([edit], Baseline.empty()).samples.items():
            assert together[prompt] == text
            tokens = len(lm.encode(prompt).ids) + len(lm.encode(text).ids)
            assert 80 <= tokens <= 120  # 100 as they were drawn; written out and read anew they may be others
    assert Evaluator(lm, [TEXT], seed=2).answers(edits, Baseline.empty()).samples != together
    [scores] = evaluator.score(edits[:1], evaluator.baseline(edits[:1]))
    assert 0 < scores.scores[TEXT]["fluency"] < 7
    assert scores.scores[TEXT]["consistency"] is None
    with pytest.raises(TokenError, match="leaves no room"):
        evaluator.check(edits[0].model_copy(update={"generation": ("a " * 120,)}))


def test_consistency_needs_reference_texts(tmp_path: Path) -> None:
    edit = rich_edit(0).model_copy(update={"relation": "city"})
    file = tmp_path / "texts.jsonl"
    file.write_text(
        json.dumps({"relation": "city", "target": edit.target_new, "text": "Mira lives in the city of Oslo"})
    )
    evaluator = Evaluator(shared("gpt2"), [TEXT], references=References.load(file))
    [scores] = evaluator.score([edit], evaluator.baseline([edit]))
    assert 0 < scores.scores[TEXT]["consistency"] <= 1


def test_answers_of_every_kind_go_through_a_file() -> None:
    edits = [rich_edit(0)]
    evaluator = Evaluator(shared("gpt2"), [ROME, TEXT, WILD, JUDGED], judge=lambda question, answer, text: True)
    whole = evaluator.baseline(edits)
    assert whole.answers.open
    assert whole.answers.samples
    assert whole.answers.verdicts
    assert Baseline.from_json(json.loads(json.dumps(whole.as_json()))) == whole
    assert Baseline.empty().joined(whole) == whole


# --------------------------------------------------------------------------- contexts and judges


def test_chat_asks_in_the_models_own_form() -> None:
    lm = fresh("gemma2")
    with pytest.raises(NotApplicable, match="no chat form"):
        Evaluator(lm, [CHAT])
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [model]{% endif %}"
    )
    assert asked_in(lm, "chat", "Who?") == "[user] Who? [model]"
    # The tokenizer adds the start token itself: once, not twice.
    assert lm.encode(asked_in(lm, "chat", "Who?")).ids.count(lm.tokenizer.bos_token_id) == 1
    evaluator = Evaluator(lm, [CHAT])
    [scores] = evaluator.score([rich_edit(0)], evaluator.baseline([rich_edit(0)]))
    assert scores.scores[CHAT]["locality"] == 1.0


def test_a_judge_is_asked_once_for_each_text() -> None:
    asked: list[tuple[str, str, str]] = []

    def judge(question: str, answer: str, text: str) -> bool:
        asked.append((question, answer, text))
        return answer in text

    edits = [rich_edit(0)]
    evaluator = Evaluator(shared("gpt2"), [JUDGED], judge=judge)
    baseline = evaluator.baseline(edits)
    seen = len(asked)
    assert seen == len(set(asked)) > 2
    [scores] = evaluator.score(edits, baseline)
    assert len(asked) == seen
    assert scores.scores[JUDGED]["reliability"] == 0.0
    assert scores.scores[JUDGED]["portability"] == 1.0
    with pytest.raises(EditError, match="needs a judge"):
        Evaluator(shared("gpt2"), [JUDGED])


class _Chat(BaseHTTPRequestHandler):
    """As much of a chat endpoint as a judge needs; it says what its model is called."""

    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({**body, "key": self.headers.get("Authorization"), "path": self.path})
        said = json.dumps({"choices": [{"message": {"content": body["model"]}}]}).encode()
        self.send_response(500 if body["model"] == "broken" else 200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    seen: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Chat", (_Chat,), {"seen": seen}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    server.shutdown()
    server.server_close()


def test_a_judge_behind_an_endpoint(
    endpoint: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = endpoint
    monkeypatch.setenv("MY_KEY", "secret")
    for model, verdict in (("Correct.", True), ("INCORRECT", False)):
        judge = EndpointJudge(JudgeConfig(url=url, model=model, key_variable="MY_KEY"))
        assert judge("Who?", "Ida", " Ida Vane") is verdict
    assert seen[0]["path"] == "/v1/chat/completions"
    assert (seen[0]["temperature"], seen[0]["key"]) == (0, "Bearer secret")
    assert "Ida Vane" in seen[0]["messages"][1]["content"]
    for model, message in (("broken", "does not answer"), ("perhaps", "gives no verdict")):
        with pytest.raises(EvereditError, match=message):
            EndpointJudge(JudgeConfig(url=url, model=model))("Who?", "Ida", "x")
    with pytest.raises(EvereditError, match="does not answer"):
        EndpointJudge(JudgeConfig(url="http://127.0.0.1:9", model="x"))("Who?", "Ida", "x")
