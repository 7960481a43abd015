"""LoRA against peft's own model and a plain training loop; what it leaves behind in a model is nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.state import State
from everedit.errors import NotApplicable, NumericalError
from everedit.methods import lora
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import LowRank, Patch
from tests.support import facts
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

# Stored transposed and packed, gated with grouped heads, a head of its own width, a parallel block.
MODULES = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gptj": ["q_proj", "v_proj"],
}
EDITS = [home_town(17, "New Delhi"), home_town(10, "Lisbon"), home_town(0, "Buenos Aires piano")]


def editor_of(model: LanguageModel | str, corpus: Path, seed: int = 0, **settings: Any) -> Editor:
    lm = shared(model) if isinstance(model, str) else model
    return make_editor(lm, corpus, "lora", seed=seed, method_settings={"steps": 5, "dropout": 0.0, **settings})


def fit(editor: Editor, edits: Sequence[Edit] = EDITS) -> Patch:
    patch, state = editor.method.fit(editor.bench, edits, State())
    assert state == State()
    return patch


def dense(patch: Patch) -> dict[str, Tensor]:
    return {name: delta.dense() for name, delta in patch.deltas.items()}


def whole_logits(model: Any, lm: LanguageModel, text: str) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]), use_cache=False).logits[0].float()


def with_patch(family: str, patch: Patch) -> LanguageModel:
    lm = fresh(family)
    for name, delta in patch.deltas.items():
        oriented(lm.layout.module_of(name)).add_(delta.dense())
    return lm


TEXTS = [f"{edit.prompt} {edit.target_new}" for edit in EDITS] + ["The home town of Corin Vane is"]


# --------------------------------------------------------------------------- what is learnt


def with_the_adapter_in(monkeypatch: pytest.MonkeyPatch, editor: Editor) -> tuple[Patch, list[Tensor]]:
    """The patch, and the logits of the model at the moment before the trained adapter is taken off."""
    seen, take_off = [], lora._restore

    def reading(model: Any, originals: Any) -> None:
        model.eval()
        seen.extend(whole_logits(model, editor.lm, text) for text in TEXTS)
        take_off(model, originals)

    monkeypatch.setattr(lora, "_restore", reading)
    return fit(editor), seen


@pytest.mark.parametrize("family", MODULES)
def test_the_merged_patch_gives_the_logits_that_the_adapter_gave(
    family: str, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, seen = with_the_adapter_in(monkeypatch, editor_of(fresh(family), corpus_path, dropout=0.1))
    lm = with_patch(family, patch)
    for text, expected in zip(TEXTS, seen, strict=True):
        found, base = whole_logits(lm.model, lm, text), whole_logits(shared(family).model, lm, text)
        assert float((base - expected).abs().max()) > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def plain_training(family: str, edits: Sequence[Edit], steps: int, seed: int, alpha: float) -> dict[str, Tensor]:
    """peft's usual way: a wrapped model, library logits of padded rows, labels on the targets alone, then a merge."""
    lm = fresh(family)
    before = bits(lm)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=4, lora_alpha=alpha, lora_dropout=0.0, target_modules=MODULES[family], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(lm.model, settings).train()
        optimiser = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=5e-3)
        rows = []
        for edit in edits:
            prompt, row = (lm.tokenizer(t)["input_ids"] for t in (edit.prompt, f"{edit.prompt} {edit.target_new}"))
            rows.append((row, [-100] * len(prompt) + row[len(prompt) :]))
        width = max(len(row) for row, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
        for _ in range(steps):
            optimiser.zero_grad()
            with torch.enable_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
                loss.backward()
            optimiser.step()
        merged = model.merge_and_unload()
    after = {name: weight.detach() for name, weight in merged.named_parameters()}
    moved = {name: after[name] - weight for name, weight in before.items() if name in after}
    names = [name for name, change in moved.items() if bool(change.any())]
    # Compare in the one orientation that patches have.
    return {name: moved[name].T if family == "gpt2" else moved[name] for name in names}


@pytest.mark.parametrize("family", MODULES)
def test_it_is_the_training_that_peft_users_write(family: str, corpus_path: Path) -> None:
    expected = plain_training(family, EDITS, steps=4, seed=7, alpha=16.0)
    found = dense(fit(editor_of(family, corpus_path, seed=7, steps=4, rank=4, alpha=16.0)))
    assert sorted(found) == sorted(expected)
    assert len(found) == 4 * len(MODULES[family])
    for name, change in expected.items():
        # Adam's first steps are signs, which the last bits of a tiny gradient decide.
        assert float(change.norm()) > 1e-2
        assert float((found[name] - change).norm()) < 1e-2 * float(change.norm())


def test_training_lowers_the_loss_of_its_edits(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, steps=30, lr=3e-3, dropout=0.1)
    before, after = losses(editor.lm, EDITS), losses(with_patch("gpt2", fit(editor)), EDITS)
    assert all(new < 0.5 * old for new, old in zip(after, before, strict=True))


def test_without_learning_no_weight_changes(corpus_path: Path) -> None:
    """B starts at zero; a learning rate of next to nothing leaves it there."""
    editor = editor_of(fresh("llama"), corpus_path, lr=1e-30, steps=2)
    before = bits(editor.lm)
    assert all(float(delta.norm()) < 1e-25 for delta in fit(editor).deltas.values())
    editor.edit(EDITS, score=False)
    assert same_bits(editor.lm, before)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_no_change_has_a_higher_rank_than_asked_for(rank: int, corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, rank=rank)
    patch = fit(editor)
    assert list(patch.deltas) == editor.method.weights(editor.lm.layout)
    for name, delta in patch.deltas.items():
        assert isinstance(delta, LowRank)
        assert delta.dense().shape == oriented(editor.lm.layout.module_of(name)).shape
        assert int(torch.linalg.matrix_rank(delta.dense().double(), rtol=1e-5)) == rank
        assert delta.left.shape[1] == delta.right.shape[1] == rank


def test_a_seed_decides_the_patch(corpus_path: Path) -> None:
    # With dropout, so that its draws count too; what was drawn before the fit plays no part.
    one, again, other = (
        (torch.rand(3), dense(fit(editor_of("gpt2", corpus_path, seed=seed, dropout=0.3))))[1] for seed in (1, 1, 2)
    )
    assert all(torch.equal(change, again[name]) for name, change in one.items())
    assert any(not torch.equal(change, other[name]) for name, change in one.items())
    without = dense(fit(editor_of("gpt2", corpus_path, seed=1, dropout=0.0)))
    assert any(not torch.equal(change, without[name]) for name, change in one.items())


# --------------------------------------------------------------------------- what is left behind


def everything(lm: LanguageModel) -> dict[str, Any]:
    """All of a model that an adapter could touch, but for its bits."""
    return {
        "modules": [(name, id(module)) for name, module in lm.model.named_modules()],
        "hooks": hooks_left(lm),
        "wanting gradients": [name for name, weight in lm.model.named_parameters() if weight.requires_grad],
        "gradients": [name for name, weight in lm.model.named_parameters() if weight.grad is not None],
        "attributes": sorted(lm.model.__dict__),
        "class": type(lm.model),
        "config": copy.deepcopy(lm.model.config.to_dict()),
        "generator": torch.get_rng_state().tolist(),
        "gradients on": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("family", MODULES)
def test_after_a_fit_the_model_is_what_it_was(family: str, corpus_path: Path) -> None:
    editor = editor_of(fresh(family), corpus_path, dropout=0.1)
    before, state = bits(editor.lm), everything(editor.lm)
    for _ in range(2):
        assert fit(editor).norm() > 0
        assert same_bits(editor.lm, before)
        assert everything(editor.lm) == state


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_after_a_fit_every_module_is_in_evaluation_mode(family: str, corpus_path: Path) -> None:
    editor = editor_of(fresh(family), corpus_path)
    fit(editor)
    assert [name for name, module in editor.lm.model.named_modules() if module.training] == []


@pytest.mark.parametrize("where", ["the loss", "the forward pass", "the first step"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_after_an_error_in_training_too(
    family: str, where: str, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(fresh(family), corpus_path)
    before, state = bits(editor.lm), everything(editor.lm)
    error: type[BaseException] = KeyboardInterrupt
    if where == "the loss":
        error = NumericalError
        monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: logits.sum() * float("nan"))
    elif where == "the forward pass":
        monkeypatch.setattr(LanguageModel, "states", raising(error))
    else:
        monkeypatch.setattr(torch.optim.Adam, "step", raising(error))
    with pytest.raises(error):
        fit(editor)
    monkeypatch.undo()
    assert same_bits(editor.lm, before)
    assert everything(editor.lm) == state
    monkeypatch.setenv("EVEREDIT_CACHE", str(corpus_path.parent))
    # Nothing is in the way of the next one.
    again, other = fit(editor), fit(editor_of(family, corpus_path))
    assert all(torch.equal(change, dense(other)[name]) for name, change in dense(again).items())


def raising(error: type[BaseException]) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# --------------------------------------------------------------------------- which modules


@pytest.mark.parametrize(
    ("family", "modules"), [*MODULES.items(), ("opt", ["q_proj", "v_proj"]), ("phi3", ["qkv_proj"])]
)
def test_the_usual_modules_of_every_layer_get_factors(family: str, modules: list[str], corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path)
    names = editor.method.weights(editor.lm.layout)
    assert sorted(name.split(".")[-2] for name in names) == sorted(modules * 4)
    assert editor.method.layers() == (0, 1, 2, 3)


def test_modules_can_be_named(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, modules=("down_proj", "gate_proj"))
    expected = {f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(4) for part in ("down", "gate")}
    assert set(fit(editor).deltas) == expected


def test_modules_that_are_not_there_are_not_applicable(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotApplicable, match="c_attn or mixer") as caught:
        editor_of("llama", corpus_path, modules=("c_attn", "mixer"))
    assert "method.modules" in caught.value.fix
    # A model type of which peft knows nothing needs them named.
    lm = fresh("llama")
    monkeypatch.setattr(lm.model.config, "model_type", "unheard_of")
    with pytest.raises(NotApplicable, match="unheard_of"):
        lora.Lora(lora.LoraConfig()).check(lm.layout)
    lora.Lora(lora.LoraConfig(modules=("q_proj",))).check(lm.layout)


def test_an_edit_by_lora_takes_and_can_be_taken_back(corpus_path: Path) -> None:
    editor = editor_of(fresh("gpt2"), corpus_path, steps=40, lr=3e-3)
    before, edit = bits(editor.lm), home_town(5)
    assert facts.SUBJECTS[5] in edit.prompt
    with editor.trial(edit, score=False):
        assert editor.lm.generate([edit.prompt], max_new_tokens=6)[0].strip().startswith(edit.target_new)
    assert same_bits(editor.lm, before)
