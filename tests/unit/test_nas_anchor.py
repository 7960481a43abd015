"""NAS's anchor is a fact about the unedited model, cached under all that it depends on; what is written is so long."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Lowercase
from torch import Tensor
from torch.nn.functional import normalize

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig, optimise_targets
from everedit.errors import CacheError, EvereditError
from everedit.methods import method_class, method_names
from everedit.models import LanguageModel
from everedit.policies.nas import Nas, NasConfig
from tests.oracles import plain_target
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import bits, fresh, same_bits, shared
from tests.support.running import records, write_records

pytestmark = pytest.mark.usefixtures("own_cache")

QUICK = TargetConfig(steps=8)
Anchored = Callable[..., Editor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(lm: LanguageModel, edit: Edit, module: torch.nn.Module, put: Tensor | None = None) -> list[Tensor]:
    """What a module of layer 1, made to put out ``put``, and its block show at the subject's last token."""
    found: list[Tensor] = []

    def read(module: torch.nn.Module, _: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if put is not None and module is not lm.layout.block(1):
            hidden[0, -1] = put
        found.append(hidden[0, -1].clone())

    handles = [part.register_forward_hook(read) for part in (module, lm.layout.block(1))]
    row = lm.encode(edit.prompt, subject=edit.subject)
    with torch.no_grad():
        lm.model(torch.tensor([row.ids[: row.subject_last + 1]]))
    for handle in handles:
        handle.remove()
    return found


# --------------------------------------------------------------------------- what is written


def test_values_in_proportion_to_the_weights_grow_without_bound_and_with_the_anchor_they_do_not() -> None:
    """A linear memory whose values are a tenth longer than what it gives, and turned a little."""

    def norms(nas: Nas | None, steps: int = 600, size: int = 12) -> np.ndarray:
        weight, found = normal(size, size, seed=1) / size**0.5, []
        for step in range(steps):
            key = normalize(normal(size, seed=100 + step), dim=0)
            now = weight @ key
            turned = now + 0.3 * now.norm() * normalize(normal(size, seed=5000 + step), dim=0)
            one = Target(now, 1.1 * turned / turned.norm() * now.norm() - now, (), 1.0, now)
            if nas is not None:
                [one], _ = nas.adjust([one], State())
            weight = weight + torch.outer(one.delta, key)
            found.append(float(weight.norm()))
        return np.log(found)

    free, held = norms(None), norms(Nas(NasConfig(anchor=1.0)))
    steps = np.arange(len(free))
    assert np.corrcoef(steps, free)[0, 1] > 0.98
    assert free[-1] - free[0] > math.log(50)
    # Each step takes ||W k||^2 from ||W||^2 and puts a^2 there: the balance is at ||W||^2 = size a^2.
    assert held.max() < math.log(1.5 * 12**0.5)
    assert abs(np.polyfit(steps, held, 1)[0]) < 0.05 * np.polyfit(steps, free, 1)[0]


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2"])
def test_the_written_value_is_what_the_mlp_must_put_out(family: str, site: str) -> None:
    lm, edit = shared(family), home_town(1)
    one = optimise_targets(lm, [edit], ["", "Yes. "], 1, QUICK, site=site)[0]
    # Where a norm stands behind the MLP, it is the norm's output that is added to the stream.
    norm = lm.layout.mlp_norm(1) if site == "block" else None
    module = norm or lm.layout.mlp_out(1)
    [before, _], [put, block] = (outputs(lm, edit, module, value) for value in (None, one.written))
    assert torch.allclose(one.before, before, atol=1e-4)
    assert torch.allclose(one.written, before + one.delta, atol=1e-4)
    assert one.delta.norm() > 0.1
    assert torch.allclose(block if site == "block" else put, one.value, atol=1e-4)


@pytest.mark.parametrize(("family", "method"), [("gpt2", "rome"), ("gemma2", "memit")])
def test_an_anchor_of_the_values_own_length_changes_no_bit_of_the_edit(
    family: str, method: str, corpus_path: Path
) -> None:
    host, edit = make_editor(family, corpus_path, method), home_town(0)
    host.prepare()
    own = float(host.method.targets(host.bench, [edit])[0].written.norm())
    host.edit(edit, score=False)
    for anchor in (own, 0.9 * own):
        editor = make_editor(family, corpus_path, method, "nas", policy_settings={"anchor": anchor})
        editor.edit(edit, score=False)
        assert same_bits(editor.lm, bits(host.lm)) == (anchor == own)


# Not r-rome, which asks its averaged key for the bare prompt's value even where that is to stay as it is.
WRITERS = [name for name in method_names() if method_class(name).traits.solves_values and name != "r-rome"]


@pytest.mark.parametrize("method", WRITERS)
def test_a_skipped_edit_asks_the_host_for_nothing(method: str, corpus_path: Path) -> None:
    host, edit = make_editor("gemma2", corpus_path, method), home_town(0)
    host.prepare()
    own = float(host.method.targets(host.bench, [edit])[0].written.norm())
    norms = [host.edit(edit, score=False).norm]
    for ratio in (1.99, 2.01):
        editor = make_editor("gemma2", corpus_path, method, "nas", policy_settings={"anchor": own / ratio})
        norms.append(editor.edit(edit, score=False).norm)
        assert editor.state().policy.values == {"skipped": int(ratio > 2)}
    assert norms[1] > 0.1 * norms[0]
    assert norms[2] < 1e-5 * norms[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_after_every_edit_of_a_stream_the_edited_layer_gives_the_anchors_length(family: str, corpus_path: Path) -> None:
    editor = make_editor(family, corpus_path, "rome", "nas", policy_settings={"anchor": 17.0, "skip_beyond": 100.0})
    for edit in [home_town(person) for person in range(3)]:
        before = outputs(editor.lm, edit, editor.lm.layout.mlp_out(1))[0].norm()
        editor.edit(edit, score=False)
        assert float(outputs(editor.lm, edit, editor.lm.layout.mlp_out(1))[0].norm()) == pytest.approx(17.0, rel=1e-3)
        assert abs(float(before) - 17.0) > 0.1


# --------------------------------------------------------------------------- measuring the anchor


@pytest.fixture
def anchored(corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Anchored:
    """Makes a prepared editor with NAS over a pool of four facts; anchors are cached apart from all else."""
    write_records(tmp_path / "pool.jsonl", records(4))

    def make(lm: LanguageModel | str = "gpt2", method: str = "rome", target: Any = QUICK, **nas: Any) -> Editor:
        settings = {"policy_settings": {"pool": str(tmp_path / "pool.jsonl"), **nas}}
        settings["method_settings"] = {**METHOD_SETTINGS[method], "target": target.model_dump()}
        editor = make_editor(lm, corpus_path, method, "nas", **settings)
        monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "anchored"))
        editor.prepare()
        return editor

    return make


def anchor(editor: Editor) -> float:
    [nas] = editor.policy.parts
    assert isinstance(nas, Nas)
    assert nas.anchor is not None
    return nas.anchor


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "anchored" / "anchors").iterdir())


@pytest.mark.parametrize(("family", "method", "site"), [("gpt2", "rome", "mlp"), ("gemma2", "memit", "block")])
def test_the_anchor_is_the_trimmed_mean_over_plainly_solved_values(
    family: str, method: str, site: str, anchored: Anchored, tmp_path: Path
) -> None:
    lm, lengths = shared(family), []
    module = lm.layout.mlp_norm(1) if site == "block" else lm.layout.mlp_out(1)
    for edit in [home_town(person) for person in range(4)]:
        # Behind the bare prompt alone.
        delta = plain_target(lm, edit, [""], 1, QUICK, site).delta
        lengths.append(float((outputs(lm, edit, module)[0] + delta).norm()))
    three = sorted(lengths)[:3]
    assert sum(lengths) / 4 > 1.02 * sum(three) / 3
    assert anchor(anchored(lm, method, quantile=0.75)) == pytest.approx(sum(three) / 3, rel=1e-3)
    assert anchor(anchored(lm, method, quantile=1.0)) == pytest.approx(sum(lengths) / 4, rel=1e-3)
    by_path = anchored(lm, method, quantile=1.0, pool="plain", pool_path=str(tmp_path / "pool.jsonl"))
    assert anchor(by_path) == pytest.approx(sum(lengths) / 4, rel=1e-3)


def test_an_anchor_measured_after_edits_is_that_of_the_unedited_model(
    anchored: Anchored, corpus_path: Path, tmp_path: Path
) -> None:
    expected = anchor(anchored())
    [file] = files(tmp_path)
    file.unlink()
    edited = make_editor("gpt2", corpus_path, "rome", "nas", policy_settings={"anchor": 20.0})
    edited.edit(home_town(5), score=False)
    edited.edit(home_town(6), score=False)
    settings = {"policy_settings": {"pool": str(tmp_path / "pool.jsonl")}}
    settings["method_settings"] = {**METHOD_SETTINGS["rome"], "target": QUICK.model_dump()}
    editor = make_editor("gpt2", corpus_path, "rome", "nas", **settings)
    editor.load_state(edited.state())
    now = bits(editor.lm)
    editor.prepare()
    assert same_bits(editor.lm, now)
    assert anchor(editor) == expected
    assert files(tmp_path) == [file]
    # The edited model itself would have given another.
    pool = [home_town(person) for person in range(4)]
    lengths = sorted(float(one.written.norm()) for one in editor.method.targets(editor.bench, pool, [""]))
    assert sum(lengths[:3]) / 3 != pytest.approx(expected, rel=1e-3)


def test_an_anchor_in_the_cache_is_read_and_not_measured_again(
    anchored: Anchored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = anchored()
    [file] = files(tmp_path)
    told = json.loads(file.read_text())
    assert (told["anchor"], told["facts"], told["method"]) == (anchor(first), 4, "rome")
    assert told["model"] == first.lm.fingerprint
    assert told["settings"]["target"] == QUICK.model_dump()
    assert {"samples", "seed", "quantile", "pool"} <= told["nas"].keys()
    monkeypatch.setattr("everedit.methods._rank_one.optimise_targets", None)
    assert anchor(anchored()) == anchor(first)
    # What is done with the anchor is no part of it.
    assert anchor(anchored(skip_beyond=9.0, enlarge=False)) == anchor(first)
    assert files(tmp_path) == [file]
    with pytest.raises(TypeError):
        anchored(seed=1)


def test_whatever_an_anchor_depends_on_gives_another_file(anchored: Anchored, tmp_path: Path) -> None:
    other = fresh("gpt2")
    other.model.transformer.h[3].mlp.c_proj.weight[0, 0] += 1.0
    variants: list[dict[str, Any]] = [
        {}, {"samples": 3}, {"seed": 1}, {"quantile": 0.5}, {"target": TargetConfig(steps=7)}, {"method": "memit"},
        {"method": "r-rome"}, {"lm": other}, {"lm": "llama"},
    ]  # fmt: skip
    for n, variant in enumerate(variants, start=1):
        anchored(**variant)
        assert len(files(tmp_path)) == n, variant


def test_a_pool_with_other_facts_in_it_gives_another_anchor(anchored: Anchored, tmp_path: Path) -> None:
    stale = anchor(anchored())
    write_records(tmp_path / "pool.jsonl", records(4, first=8))
    found = anchor(anchored())
    for file in files(tmp_path):
        file.unlink()
    assert anchor(anchored()) != stale
    assert found == anchor(anchored())


def test_another_tokenizer_gives_another_anchor(anchored: Anchored, tmp_path: Path) -> None:
    lm = fresh("gpt2")
    stale = anchor(anchored(lm))
    other = replace(lm, tokenizer=deepcopy(lm.tokenizer))
    other.tokenizer.backend_tokenizer.normalizer = Lowercase()
    found = anchor(anchored(other))
    for file in files(tmp_path):
        file.unlink()
    assert anchor(anchored(other)) != stale
    assert found == anchor(anchored(other))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"anchor": null}', b'{"anchor": "long"}', b'{"anchor": NaN}',
     b'{"anchor": -3.0}', b'{"anchor": 0}'],
    ids=repr,
)  # fmt: skip
def test_a_damaged_anchor_is_one_clear_error(content: bytes, anchored: Anchored, tmp_path: Path) -> None:
    anchored()
    [file] = files(tmp_path)
    file.write_bytes(content)
    with pytest.raises(CacheError, match=f"damaged.*{file.name}") as caught:
        anchored()
    assert str(file) in caught.value.fix
    file.unlink()
    assert anchor(anchored()) > 0


def test_a_pool_that_holds_no_fact_is_an_error_of_our_own(anchored: Anchored, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("")
    with pytest.raises(EvereditError):
        anchored()
    with pytest.raises(EvereditError, match="no such data file"):
        anchored(pool="elsewhere.jsonl")
