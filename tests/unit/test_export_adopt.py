"""A model that somebody else edited, as one patch of its base: found, exact, and refused where it is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit.engine.weights import EditedWeights
from everedit.errors import ModelError, NotApplicable
from everedit.export import Source, difference, export
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import Dense, LowRank, Patch
from tests.support import tiny
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, fresh, same_bits, shared

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def saved(lm: LanguageModel, folder: Path) -> Path:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def peer(folder: Path, family: str = "llama", dtype: str = "float32", **changes: torch.Tensor) -> Path:
    """A family's model with something added to some of its parameters, as another tool would save it."""
    lm = fresh(family)
    for name, change in changes.items():
        lm.model.get_parameter(name).add_(change)
    lm.model.to(getattr(torch, dtype))
    return saved(lm, folder)


def low_rank(rank: int, rows: int = 64, columns: int = 256, size: float = 0.1) -> torch.Tensor:
    made = torch.Generator().manual_seed(rank)
    return size * torch.randn(rows, rank, generator=made) @ torch.randn(rank, columns, generator=made)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_own_merged_export_comes_back_as_the_edits(
    family: str, corpus_path: Path, tmp_path: Path, own_cache: Path
) -> None:
    """Committed to the base, it makes the edited model: for GPT-2, which stores its weights transposed, too."""
    editor = make_editor(family, corpus_path, "memit")
    edits = [home_town(0), home_town(10)]
    editor.edit(edits, score=False)
    export(Source.of_editor(editor), "merged", tmp_path / "merged")
    patch = difference(shared(family), tmp_path / "merged")
    assert patch.deltas.keys() == editor.norm_ratios().keys()
    for name, delta in patch.deltas.items():
        assert isinstance(delta, LowRank)
        assert delta.left.shape[1] == patch.info["weights"][name]["rank"] == 2
        assert patch.info["weights"][name]["relative_error"] < 1e-5
    assert patch.info["base"] == shared(family).fingerprint
    patch.save(tmp_path / "patch.safetensors")
    mine = fresh(family)
    weights = EditedWeights(mine)
    weights.commit(Patch.load(tmp_path / "patch.safetensors"))
    for name in patch.deltas:
        theirs = oriented(editor.lm.layout.module_of(name))
        torch.testing.assert_close(oriented(mine.layout.module_of(name)), theirs, rtol=1e-5, atol=1e-6)
    assert losses(mine, edits) == pytest.approx(losses(editor.lm, edits), abs=1e-4)
    # And it is one commit like any other.
    weights.restore(EditedWeights(mine).snapshot())
    assert same_bits(mine, bits(shared(family)))


def test_a_change_without_low_rank_comes_whole_and_exact(tmp_path: Path) -> None:
    full = low_rank(64)
    patch = difference(shared("llama"), peer(tmp_path / "peer", **{WEIGHT: full}))
    [(name, delta)] = patch.deltas.items()
    assert (name, patch.info["weights"][name]["rank"]) == (WEIGHT, None)
    assert isinstance(delta, Dense)
    mine = fresh("llama")
    EditedWeights(mine).commit(patch)
    assert torch.equal(mine.model.get_parameter(WEIGHT), fresh("llama").model.get_parameter(WEIGHT) + full)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("rank", "low"), [(3, True), (64, False)])
def test_a_peer_in_half_precision_differs_only_where_it_was_edited(
    dtype: str, rank: int, low: bool, tmp_path: Path
) -> None:
    """All of its weights were rounded, which is no edit; what its edit is in that precision is taken as it is."""
    change, half = low_rank(rank, size=1.0), getattr(torch, dtype)
    folder = peer(tmp_path / "peer", dtype=dtype, **{WEIGHT: change})
    [(name, delta)] = difference(shared("llama"), folder).deltas.items()
    assert (name, isinstance(delta, LowRank)) == (WEIGHT, low)
    assert not low or delta.rank() == rank
    base = shared("llama").model.get_parameter(WEIGHT)
    wanted = (base + change).to(half).double()
    found = (base.to(half).double() + delta.dense().double()).to(half).double()
    assert float((found - wanted).norm()) <= (torch.finfo(half).eps * float(wanted.norm()) if low else 0)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda folder: None, ModelError, "does not differ from its base"),
        (lambda folder: rewrite(folder, "config.json", hidden_act="gelu"), ModelError, "config says hidden_act: gelu"),
        (lambda folder: rewrite(folder, "config.json", rms_norm_eps=0.1), ModelError, "config says rms_norm_eps"),
        (lambda folder: (folder / "model.safetensors").unlink(), ModelError, "no folder with a model's safetensors"),
        (lambda folder: cut(folder / "model.safetensors"), ModelError, "cannot load the model"),
        (lambda folder: tiny.build_tokenizer("gemma2").save_pretrained(folder), ModelError, "another vocabulary"),
    ],
    ids=["same", "config", "number", "no weights", "cut", "tokenizer"],
)
def test_what_is_no_edit_of_the_base_is_refused(
    change: Callable[[Path], Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    folder = peer(tmp_path / "peer")
    change(folder)
    before = bits(shared("llama"))
    with pytest.raises(error, match=reason):
        difference(shared("llama"), folder)
    assert same_bits(shared("llama"), before)


def rewrite(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_another_architecture_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"it is a {family} model, and the base is a llama") as caught:
        difference(shared("llama"), tiny.trained(family))
    assert "base model that it was edited from" in caught.value.fix


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder with a model's safetensors") as caught:
        difference(shared("llama"), tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model.norm.weight"), ("gpt2", "transformer.h.1.mlp.c_proj.bias")]
)
def test_what_a_patch_cannot_hold_is_named(family: str, name: str, tmp_path: Path) -> None:
    folder = peer(tmp_path / "peer", family, **{name: torch.tensor(0.5)})
    with pytest.raises(NotApplicable, match=name.replace(".", r"\.")) as caught:
        difference(shared(family), folder)
    assert "base model of its own" in caught.value.fix


def test_an_edited_embedding_is_a_matrix_like_any_other(tmp_path: Path) -> None:
    """Tied to the head: it is one weight, and one change."""
    name = "transformer.wte.weight"
    rows = shared("gpt2").model.get_parameter(name).shape[0]
    folder = peer(tmp_path / "peer", "gpt2", **{name: low_rank(1, rows, 64)})
    patch = difference(shared("gpt2"), folder)
    assert {name: row["rank"] for name, row in patch.info["weights"].items()} == {name: 1}
