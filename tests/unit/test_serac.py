"""SERAC: scores and losses against texts read one by one; out of scope every bit is the base's, in scope h answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from everedit.edit import Edit, Probe
from everedit.editor import Editor
from everedit.engine.state import State
from everedit.errors import EditError, ModelError, NotApplicable, TokenError
from everedit.evaluation.read import generate, read
from everedit.methods.serac import ScopedMemory, SeracLearner, counterfactual_prompt
from everedit.models import LanguageModel
from everedit.models.sentences import PACKAGED, load_encoder
from tests.support import facts, tiny
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, edit_of, fresh, hooks_left, probe_of, same_bits, shared
from tests.support.training import TRAINED, checkpoint
from tests.support.wide import greedy

pytestmark = pytest.mark.usefixtures("own_cache")

TABLE = facts.facts()
OUTSIDE = [
    Probe(prompt="Water freezes into", answer="ice"),
    probe_of(TABLE[70]),
    Probe(prompt="Bees", answer="make honey"),
]
EXAMPLES = [
    edit_of(TABLE[number], target, locality=(probe,))
    for number, target, probe in zip((0, 4, 8), (None, "Buenos Aires piano", None), OUTSIDE, strict=True)
]
EDITS = [home_town(7, "Lisbon"), home_town(24, "New Delhi"), home_town(4, "Buenos Aires piano")]
FAR = ["Water freezes into", "Bees make", "In short: the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose h answers the three edits, behind the edit and its prompt."""
    examples = [edit.model_copy(update={"locality": tuple(OUTSIDE[:1])}) for edit in EDITS]
    return checkpoint(shared("llama"), "serac", examples, tmp_path_factory.mktemp("serac") / "out", steps=40)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder of one narrow layer with the packaged one's tokenizer, to be trained in no time."""
    path = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        BertModel(BertConfig(**sizes)).save_pretrained(path)
    load_encoder(PACKAGED)[1].save_pretrained(path)
    return str(path)


def editor_of(model: LanguageModel | str, corpus: Path, folder: Path, **more: Any) -> Editor:
    # An untrained classifier knows an edit of three words by less than the published half.
    return make_editor(model, corpus, "serac", method_settings={"checkpoint": folder, "limit": 0.4, **more})


def learner_of(model: str | LanguageModel, encoder: str, **more: Any) -> SeracLearner:
    settings = {**TRAINED["serac"], "train_encoder": True, "encoder": encoder, **more}
    lm = shared(model) if isinstance(model, str) else model
    editor = Editor(lm, "serac", method_settings=settings)
    learner = editor.method.learner(editor.bench)  # type: ignore[attr-defined]
    assert isinstance(learner, SeracLearner)
    return learner


def memory_of(editor: Editor) -> ScopedMemory:
    memory = editor.method.memory(editor.bench, editor.state().method)
    assert isinstance(memory, ScopedMemory)
    return memory


def vector(learner: SeracLearner, text: str, second: str | None = None) -> Tensor:
    """f of one text, or of one pair, in float64 behind the encoder."""
    inputs = learner.tokenizer(text, second, return_tensors="pt")
    states = learner.encoder(**inputs).last_hidden_state[0].double()
    found = states[0] if learner.config.pooling == "first" else states.mean(0)
    return found / found.norm() if learner.config.unit else found


def distance(learner: SeracLearner, edit: Edit, query: str) -> Tensor:
    """-log s of an edit and a query."""
    apart = vector(learner, edit.prompt, edit.target_new) - vector(learner, query)
    return learner.config.gamma * apart.pow(2).sum()


SETTINGS: list[dict[str, Any]] = [{}, {"pooling": "first", "gamma": 0.3}, {"unit": False, "gamma": 0.02}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_scores_are_those_of_texts_embedded_one_at_a_time(
    settings: dict[str, Any], corpus_path: Path, folder: Path
) -> None:
    editor = editor_of("llama", corpus_path, folder, **settings)
    editor.edit(EDITS, score=False)
    memory, queries = memory_of(editor), [*(edit.prompt for edit in EDITS), *FAR, "a"]
    found = memory.scores(queries)
    with torch.no_grad():
        expected = [[(-distance(memory.learner, edit, query)).exp().item() for query in queries] for edit in EDITS]
    assert found.tolist() == [pytest.approx(row, rel=1e-3) for row in expected]
    assert bool(((found > 0) & (found <= 1)).all())
    # Of an edit's own text, and only of that, the score is 1.
    own = memory.learner.embed([EDITS[1].prompt], [EDITS[1].target_new])
    assert (-memory.learner.distances(own, own)).exp().item() == 1.0
    assert found.max() < 0.99


def test_more_edits_never_lower_the_best_score_and_their_order_does_not_matter(corpus_path: Path, folder: Path) -> None:
    editor = editor_of("llama", corpus_path, folder)
    queries = [*(edit.prompt for edit in EDITS), *FAR, TABLE[5].prompt]
    best = torch.zeros(len(queries))
    for edit in EDITS:
        editor.edit(edit, score=False)
        now = memory_of(editor).scores(queries).max(0).values
        assert bool((now >= best - 1e-6).all())
        best = now
    said = [speaker.prompt for speaker in editor.lm.speakers(queries, [1] * len(queries))]
    editor.reset()
    editor.edit(EDITS[::-1], score=False)
    torch.testing.assert_close(memory_of(editor).scores(queries).max(0).values, best)
    assert [speaker.prompt for speaker in editor.lm.speakers(queries, [1] * len(queries))] == said


# --------------------------------------------------------------------------- training


def by_hand(learner: SeracLearner, examples: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """The counterfactual model's loss, by whole forwards of its whole texts, and the classifier's."""
    lm, likely, inside, outside = learner.speaker, [], [], []
    for edit in examples:
        for query in (edit.prompt, (edit.rephrase or (edit.prompt,))[0]):
            text = lm.encode(f"{edit.prompt} {edit.target_new} {query}", edit.target_new)
            logits = lm.model(torch.tensor([text.ids]), use_cache=False).logits[0, text.prompt_end - 1 : -1]
            likely.append(F.cross_entropy(logits, torch.tensor(text.target_ids)))
            inside.append(distance(learner, edit, query))
        others = examples if learner.config.all_negatives else [edit]
        outside += [1 - (-distance(learner, edit, other.locality[0].prompt)).exp() for other in others]
    return torch.stack(likely).mean(), torch.stack(inside).mean() - torch.stack(outside).log().mean()


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("gpt2", {"all_negatives": True, "c_edit": 0.7, "c_scope": 0.2}), ("gemma3_text", SETTINGS[1])],
)
def test_the_loss_and_its_gradients_are_those_of_both_parts_read_text_by_text(
    family: str, settings: dict[str, Any], small: str
) -> None:
    learner = learner_of(family, small, **settings)
    # h is the base itself at first; from here on it is another model.
    for weight in learner.blocks.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    examples = [*EXAMPLES[:2], EXAMPLES[2].model_copy(update={"rephrase": ()})]
    loss, figures = learner(examples)
    loss.backward()
    trained = {name: weight for name, weight in learner.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in trained.items()}
    likely, scope = by_hand(learner, examples)
    expected = learner.config.c_edit * likely + learner.config.c_scope * scope
    gradients = torch.autograd.grad(expected, list(trained.values()))
    assert loss.item() == figures["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert (figures["nll"], figures["scope"]) == pytest.approx((likely.item(), scope.item()), rel=1e-4)
    for (name, gradient), wanted in zip(found.items(), gradients, strict=True):
        assert (gradient - wanted).norm() < 1e-3 * wanted.norm() + 1e-6, name
    parts = {name.partition(".")[0] for name in found}
    assert parts == {"blocks", "encoder"}


def test_the_two_parts_share_no_weight_and_each_has_its_own_loss(small: str) -> None:
    for settings, still in (({"c_edit": 0.0}, "blocks"), ({"c_scope": 0.0}, "encoder")):
        learner = learner_of("llama", small, **settings)
        learner(EXAMPLES)[0].backward()
        sizes = dict.fromkeys(("blocks", "encoder"), 0.0)
        for name, weight in learner.named_parameters():
            sizes[name.partition(".")[0]] += 0.0 if weight.grad is None else weight.grad.abs().sum().item()
        assert [part for part, size in sizes.items() if size == 0] == [still]
    frozen = learner_of("llama", small, train_encoder=False)
    assert [name for name, weight in frozen.named_parameters() if weight.requires_grad and "encoder" in name] == []
    [group] = frozen.groups()
    assert len(group["params"]) == len(list(frozen.blocks.parameters()))


def test_negatives_weigh_as_much_as_positives_however_many_there_are(small: str) -> None:
    learner = learner_of("llama", small, all_negatives=True)
    with torch.no_grad():
        # Twice the examples are twice the positives and four times the negatives.
        once, twice = (learner(examples)[1]["scope"] for examples in (EXAMPLES, EXAMPLES * 2))
    assert twice == pytest.approx(once, rel=1e-5)


def test_distances_too_large_for_an_exponential_and_of_nothing_have_a_loss(small: str) -> None:
    far = learner_of("llama", small, unit=False, gamma=1000.0)
    loss, figures = far(EXAMPLES)
    loss.backward()
    assert figures["scope"] > 200  # exp(-200) is 0
    assert all(bool(torch.isfinite(w.grad).all()) for w in far.encoder.parameters() if w.grad is not None)
    same = EXAMPLES[0].model_copy(update={"locality": (Probe(prompt=EXAMPLES[0].prompt, answer="x"),)})
    near = learner_of("llama", small)
    near.distances = lambda facts, queries: 0 * torch.cdist(facts, queries)  # type: ignore[method-assign]
    assert near([same])[1]["scope"] == pytest.approx(-math.log(torch.finfo(torch.float32).eps))


def test_nothing_reaches_the_base_whose_frozen_weights_h_shares(small: str) -> None:
    lm = fresh("gpt2")
    before, learner = bits(lm), learner_of(lm, small)
    own = {weight.data_ptr() for weight in learner.blocks.parameters()}
    base = {weight.data_ptr(): name for name, weight in lm.model.named_parameters()}
    theirs = {weight.data_ptr() for weight in learner.speaker.model.parameters()}
    assert own.isdisjoint(base)
    # The upper third of four layers is trained, and copied.
    assert {base[place] for place in set(base) - theirs} == {name for name in base.values() if ".h.3." in name}
    optimiser = learner.optimiser()
    for _ in range(3):
        optimiser.zero_grad()
        learner.train()
        learner(EXAMPLES)[0].backward()
        optimiser.step()
    assert same_bits(lm, before)
    assert all(weight.grad is None and not weight.requires_grad for weight in lm.model.parameters())
    assert losses(learner.speaker, EDITS) != losses(lm, EDITS)
    # Dropout stays off: a training is a function of its data and its seed.
    assert torch.equal(learner.embed(FAR), learner.embed(FAR))


# --------------------------------------------------------------------------- who answers


def test_without_edits_and_out_of_scope_every_bit_is_the_bases(corpus_path: Path, folder: Path) -> None:
    editor = editor_of("llama", corpus_path, folder)
    far = [Edit(prompt=prompt, target_new="ice") for prompt in FAR]
    plain, lm = losses(shared("llama"), [*far, *EDITS]), editor.lm
    editor.prepare()
    assert losses(lm, [*far, *EDITS]) == plain
    editor.edit(EDITS, score=False)
    assert [speaker.lm is lm for speaker in lm.speakers(FAR, [1] * 3)] == [True] * 3
    assert losses(lm, far) == losses(shared("llama"), far)
    held = editor.state()
    assert max(losses(lm, EDITS)) < 0.2 < min(plain[3:])
    with_all = losses(lm, EDITS[:2])
    # Deleting an edit gives back what was said before it.
    editor.edit(home_town(30), score=False)
    editor.load_state(held)
    assert losses(lm, EDITS[:2]) == with_all
    none = {name: part[:0] for name, part in held.method.tensors.items()}
    editor.load_state(replace(held, method=State(none)))
    assert lm.redirect is None
    assert losses(lm, [*far, *EDITS]) == plain
    editor.reset()
    assert hooks_left(lm) == []


def test_h_answers_from_the_edit_and_the_query_decided_once_for_each_prompt_of_a_batch(
    corpus_path: Path, folder: Path
) -> None:
    editor = editor_of("llama", corpus_path, folder)
    editor.edit(EDITS, score=False)
    lm, memory = editor.lm, memory_of(editor)
    other, plain = memory.learner.speaker, shared("llama")
    asked = [EDITS[2].prompt, FAR[0], EDITS[0].prompt, f"Yes. {EDITS[1].prompt}", FAR[2]]
    texts = [
        counterfactual_prompt(EDITS[n].prompt, EDITS[n].target_new, asked[at]) for at, n in ((0, 2), (2, 0), (3, 1))
    ]
    assert texts[0] == f"{EDITS[2].prompt} {EDITS[2].target_new} {asked[0]}"
    whole = [(other, texts[0]), (plain, asked[1]), (other, texts[1]), (other, texts[2]), (plain, asked[4])]
    pairs = [(prompt, target) for prompt in asked for target in ("Oslo", "Buenos Aires")]
    for (prompt, target), reading in zip(pairs, read(lm, pairs), strict=True):
        by, text = whole[asked.index(prompt)]
        ids = by.encode(text, target)
        logits = by.model(torch.tensor([ids.ids]), use_cache=False).logits[0, ids.prompt_end - 1 : -1]
        assert reading.nll == pytest.approx(F.cross_entropy(logits, torch.tensor(ids.target_ids)).item(), abs=2e-3)
        assert list(reading.predicted) == logits.argmax(-1).tolist()
    expected = [by.tokenizer.decode(greedy(by, by.encode(text).ids, 8), skip_special_tokens=True) for by, text in whole]
    assert lm.generate(asked, max_new_tokens=8) == expected
    assert expected[0].strip().startswith("Buenos Aires piano")
    written = generate(lm, asked, ["Buenos Aires piano"] * 5)
    assert all(text[: len(part)] == part[: len(text)] for text, part in zip(expected, written, strict=True))


@pytest.mark.parametrize("limit", [0.3, 0.6])
def test_a_score_above_the_limit_is_in_scope(limit: float, corpus_path: Path, folder: Path) -> None:
    editor = editor_of("llama", corpus_path, folder, limit=limit)
    editor.edit(EDITS, score=False)
    queries = [*(home_town(person).prompt for person in range(20)), *FAR]
    best = memory_of(editor).scores(queries).max(0)
    inside = [speaker.lm is not editor.lm for speaker in editor.lm.speakers(queries, [1] * len(queries))]
    assert inside == (best.values > limit).tolist()
    assert 0 < sum(inside) < len(inside)
    # At the limit itself the base answers.
    memory = memory_of(editor)
    limit = memory.scores([queries[7]]).max().item()
    memory.learner.config = memory.learner.config.model_copy(update={"limit": limit})
    assert memory.speakers(editor.lm, [queries[7]], [1])[0].lm is editor.lm


def test_in_soft_mode_both_answer_to_the_share_of_the_score(
    corpus_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of("llama", corpus_path, folder, mode="soft")
    editor.edit(EDITS, score=False)
    lm, memory = editor.lm, memory_of(editor)
    prompts = [EDITS[0].prompt, FAR[0]]
    texts = [f"{EDITS[0].prompt} Lisbon {EDITS[0].prompt}", ""]
    scores = memory.scores(prompts).max(0)
    edit = EDITS[int(scores.indices[1])]
    texts[1] = f"{edit.prompt} {edit.target_new} {FAR[0]}"

    def chance(by: LanguageModel, prompt: str) -> float:
        ids = by.encode(prompt, "Lisbon")
        return float(
            by.model(torch.tensor([ids.ids]), use_cache=False).logits[0, ids.prompt_end - 1].softmax(-1)[ids.ids[-1]]
        )

    for prompt, text, share in zip(prompts, texts, scores.values.tolist(), strict=True):
        ours, theirs = chance(shared("llama"), prompt), chance(memory.learner.speaker, text)
        assert math.exp(-read(lm, [(prompt, "Lisbon")])[0].nll) == pytest.approx(
            (1 - share) * ours + share * theirs, rel=1e-3
        )
        for fixed, alone in ((0.0, ours), (1.0, theirs)):
            with monkeypatch.context() as patch:
                patch.setattr(
                    ScopedMemory, "scores", lambda self, texts, fixed=fixed: torch.full((3, len(texts)), fixed)
                )
                one = lm.speakers([prompt], [1])[0]
                assert (one.share, one.second is None) == (fixed, False)
                if prompt == EDITS[0].prompt:
                    assert math.exp(-read(lm, [(prompt, "Lisbon")])[0].nll) == pytest.approx(alone, rel=1e-3)


def test_t5_reads_edit_and_query_in_its_encoder(corpus_path: Path) -> None:
    editor = make_editor("t5", corpus_path, "serac")
    edit = home_town(0)
    editor.edit(edit, score=False)
    speaker = memory_of(editor).learner.speaker
    source = torch.tensor([editor.lm.tokenizer(f"{edit.prompt} {edit.target_new} {edit.prompt}").input_ids])
    labels = torch.tensor([editor.lm.encode(edit.prompt, edit.target_new).target_ids])
    assert losses(editor.lm, [edit])[0] == pytest.approx(
        speaker.model(input_ids=source, labels=labels).loss.item(), abs=1e-4
    )
    assert losses(editor.lm, [edit])[0] < losses(shared("t5"), [edit])[0] - 1


# --------------------------------------------------------------------------- what it is given


def test_identical_edits_are_one_and_of_a_conflict_the_newest_stands(
    corpus_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, embed = editor_of("llama", corpus_path, folder), SeracLearner._embedded
    sizes: list[int] = []
    monkeypatch.setattr(
        SeracLearner, "_embedded", lambda self, texts, pairs: sizes.append(len(texts)) or embed(self, texts, pairs)
    )
    editor.edit([EDITS[0]] * 10_000, score=False)
    assert sizes == [1]
    assert editor.state().method.values == {"facts": 1}
    editor.edit([home_town(7, "Oslo"), home_town(7, "Cairo")], score=False)
    assert editor.state().method.values == {"facts": 1}
    assert memory_of(editor).facts[0] == (EDITS[0].prompt, "Cairo")
    # Many of them are embedded a bounded number at a time.
    sizes.clear()
    many = [Edit(prompt=f"{n} and {n} is", target_new=str(n)) for n in range(150)]
    editor.edit(many, score=False)
    assert max(sizes) <= 64
    stored = memory_of(editor).facts.embeddings
    with torch.no_grad():
        lone = torch.stack([vector(memory_of(editor).learner, edit.prompt, edit.target_new) for edit in many[::50]])
    torch.testing.assert_close(stored[1::50].double(), lone, rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused_and_loses_nothing(corpus_path: Path, folder: Path, tmp_path: Path) -> None:
    editor = editor_of("llama", corpus_path, folder)
    editor.edit(EDITS[0], score=False)
    before = editor.state()
    long = Edit(prompt="lives in the city of " * 16 + "all", target_new="Oslo")
    for work in (editor.check, editor.edit):
        with pytest.raises(TokenError, match="the model's context holds 128"):
            work(long)
    assert editor.state().method is before.method
    with pytest.raises(TokenError, match="do not fit the model's context"):
        editor.lm.speakers([EDITS[0].prompt], [120])
    t5 = make_editor("t5", corpus_path, "serac")
    with pytest.raises(TokenError, match=r"the text has \d+ tokens and the sentence encoder reads 256"):
        t5.edit(Edit(prompt="lives in the city of " * 60 + "all", target_new="x"), score=False)
    assert t5.state().method == State()


def test_networks_that_cannot_work_together_are_refused(corpus_path: Path, small: str) -> None:
    lm = shared("llama")
    bare = EXAMPLES[0].model_copy(update={"locality": ()})
    editor = Editor(lm, "serac", method_settings=TRAINED["serac"])
    with pytest.raises(EditError, match="no locality probe, and training needs one"):
        editor.method.check_example(editor.bench, bare)  # type: ignore[attr-defined]
    for settings, error, message in (
        ({"counterfactual": str(tiny.trained("gemma2"))}, NotApplicable, "has another vocabulary than"),
        ({"encoder": str(corpus_path)}, ModelError, "is no text encoder"),
        ({"layers": (9,)}, ModelError, "there is no layer 9"),
    ):
        with pytest.raises(error, match=message):
            learner_of("llama", **{"encoder": small, **settings})
    # Another model with the same tokenizer will do.
    learner = learner_of("llama", small, counterfactual=str(tiny.trained("gpt2")))
    assert learner.speaker.layout.family.name == "gpt2"
    likely, _ = by_hand(learner, EXAMPLES[:1])
    assert learner(EXAMPLES[:1])[1]["nll"] == pytest.approx(likely.item(), rel=1e-4)
