"""Exports as those meet them who load them: plain transformers, plain peft; whole or absent, whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from everedit.cache import atomic_folder
from everedit.editor import Editor
from everedit.errors import EditError, ExportError, ModelError, NotApplicable, NumericalError, UnknownName
from everedit.export import FactRecord, Source, export
from everedit.models import load_model
from everedit.models.layout import oriented
from everedit.patch import Dense, LowRank, Patch
from tests.support import tiny
from tests.support.editing import home_town, make_editor
from tests.support.loading import bits, fresh, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

EDITS = [home_town(0), home_town(10)]


def edited(family: str, corpus: Path, method: str = "", policy: str = "accumulate", **options: Any) -> Editor:
    """A family's model with two facts edited, one after the other, by a method that works for it."""
    editor = make_editor(family, corpus, method or ("ft-m" if family == "t5" else "memit"), policy, **options)
    for edit in EDITS:
        editor.edit(edit, score=False)
    return editor


def logits(model: Any, family: str) -> Tensor:
    tokenizer = shared(family).tokenizer
    ids = torch.tensor([tokenizer(f"{EDITS[0].prompt} {EDITS[0].target_new}")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids} if family == "t5" else {})).logits


def plain(folder: Path | str, family: str) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def with_adapter(model: PreTrainedModel, folder: Path) -> Any:
    with warnings.catch_warnings():
        # peft asks for what transformers will rename.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


def everything(folder: Path) -> list[str]:
    """All that is in a folder, hidden or not."""
    return sorted(part.relative_to(folder).as_posix() for part in folder.rglob("*"))


# --------------------------------------------------------------------------- merged and peft, every architecture


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_and_peft_give_the_edited_models_logits(family: str, corpus_path: Path, tmp_path: Path) -> None:
    editor = edited(family, corpus_path)
    wanted, before = logits(editor.lm.model, family), bits(editor.lm)
    with editor.unedited() as lm:
        assert float((wanted - logits(lm.model, family)).abs().max()) > 1
    source = Source.of_editor(editor, [FactRecord(edit) for edit in EDITS])
    export(source, "merged", tmp_path / "merged")
    merged = plain(tmp_path / "merged", family)
    assert torch.equal(logits(merged, family), wanted)
    found = export(source, "peft", tmp_path / "peft").figures
    # Two edits of rank one each; fine-tuning has no low rank.
    assert family == "t5" or found["rank"] == found["rank_of_change"] == 2
    assert found["relative_error"] < 1e-5
    adapted = with_adapter(plain(tiny.trained(family), family), tmp_path / "peft")
    torch.testing.assert_close(logits(adapted, family), wanted, rtol=1e-4, atol=1e-4)
    assert same_bits(editor.lm, before)


@dataclass
class Exported:
    editor: Editor
    source: Source
    merged: Path
    peft: Path


@pytest.fixture(scope="module")
def llama(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("llama")
        patch.setenv("EVEREDIT_CACHE", str(folder / "cache"))
        editor = edited("llama", corpus_path)
    source = Source.of_editor(editor, [FactRecord(edit) for edit in EDITS])
    for kind in ("merged", "peft"):
        export(source, kind, folder / kind)
    return Exported(editor, source, folder / "merged", folder / "peft")


def test_a_merged_folder_is_all_that_a_model_needs(llama: Exported) -> None:
    assert llama.merged.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in llama.merged.iterdir()} == {0o644}
    names = {path.name for path in llama.merged.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "README.md"} <= names
    tokenizer = AutoTokenizer.from_pretrained(llama.merged)
    prompt = tokenizer(EDITS[1].prompt, return_tensors="pt")
    written = plain(llama.merged, "llama").generate(**prompt, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(written[0]).startswith(f"{EDITS[1].prompt} {EDITS[1].target_new}")
    # And it is a model like any other here, with another fingerprint.
    assert load_model(llama.merged).fingerprint != llama.editor.lm.fingerprint


def test_everedit_json_says_what_was_made_from_what(llama: Exported) -> None:
    about = json.loads((llama.merged / "everedit.json").read_text())
    assert about["base"]["fingerprint"] == shared("llama").fingerprint
    assert "/" not in about["base"]["name"]
    assert (about["method"], about["policy"]) == ("memit", "accumulate")
    assert [fact["id"] for fact in about["facts"]] == [edit.id for edit in EDITS]
    weights = load_file(llama.merged / "model.safetensors")
    assert about["weights"].keys() == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    for name, described in about["weights"].items():
        assert described["sha256"] == hashlib.sha256(weights[name].numpy().tobytes()).hexdigest()
        base = oriented(shared("llama").layout.module_of(name))
        assert described["norm"] == pytest.approx(float((weights[name] - base).norm()), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_merged_model_in_another_dtype_is_rounded_once(family: str, corpus_path: Path, tmp_path: Path) -> None:
    editor = edited(family, corpus_path)
    export(Source.of_editor(editor), "merged", tmp_path / "half", dtype="bfloat16", shard="100KB")
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    half = plain(tmp_path / "half", family)
    assert half.dtype == torch.bfloat16
    # Tied weights are still one.
    heads = half.get_output_embeddings().weight, half.get_input_embeddings().weight
    assert heads[0].data_ptr() == heads[1].data_ptr()
    for name, weight in half.named_parameters():
        assert torch.equal(weight, editor.lm.model.get_parameter(name).to(torch.bfloat16)), name


def test_a_model_edited_in_half_precision_comes_out_as_it_was(corpus_path: Path, tmp_path: Path) -> None:
    editor = edited(fresh("llama", "bfloat16"), corpus_path)
    wanted = bits(editor.lm)
    source = Source.of_editor(editor, [FactRecord(edit) for edit in EDITS])
    export(source, "merged", tmp_path / "merged")
    assert same_bits(load_model(tmp_path / "merged", dtype="auto"), wanted)
    # The adapter is made from the change before it was rounded to half precision, which would have full rank.
    assert export(source, "peft", tmp_path / "peft").figures["rank"] == 2


def test_what_a_read_out_policy_shows_is_what_is_exported(corpus_path: Path, tmp_path: Path) -> None:
    # A step far larger than one would take, so that there is something to restrain.
    options = {"policy_settings": {"function": "linear"}, "method_settings": {"layers": (1,), "lr": 0.1}}
    editor = edited("llama", corpus_path, "ft-m", "prune", **options)
    stream = editor.state().weights.masters
    export(Source.of_editor(editor), "merged", tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(weights[name], editor.lm.model.get_parameter(name)) for name in stream)
    assert any(not torch.equal(weights[name], master) for name, master in stream.items()), "PRUNE restrained nothing"


def test_a_change_of_a_tied_embedding_is_merged_under_both_names(tmp_path: Path) -> None:
    lm = shared("gpt2")
    name = "transformer.wte.weight"
    change = Patch({name: Dense(torch.ones_like(lm.model.get_parameter(name)) * 0.01)})
    export(Source.of_patch(lm, change), "merged", tmp_path / "merged")
    merged = plain(tmp_path / "merged", "gpt2")
    for module in (merged.get_input_embeddings(), merged.get_output_embeddings()):
        torch.testing.assert_close(module.weight, lm.model.get_parameter(name) + 0.01)


def test_the_licence_of_the_base_comes_along(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shared("llama").model.save_pretrained(base)
    shared("llama").tokenizer.save_pretrained(base)
    (base / "LICENSE").write_text("do as you like")
    (base / "notes.txt").write_text("nobody's business")
    name = "model.layers.0.mlp.down_proj.weight"
    lm = load_model(base)
    change = Patch({name: Dense(torch.ones_like(lm.model.get_parameter(name)))})
    export(Source.of_patch(lm, change), "merged", tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like"
    assert not (tmp_path / "out" / "notes.txt").exists()


# --------------------------------------------------------------------------- the adapter


def test_the_adapter_is_what_vllm_takes(llama: Exported) -> None:
    config = json.loads((llama.peft / "adapter_config.json").read_text())
    # One rank, a scale of one, nothing that vLLM refuses (vllm/lora/peft_helper.py).
    assert config["r"] == config["lora_alpha"] == 2
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert not any(config[key] for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"))
    assert (config["target_modules"], config["layers_to_transform"]) == (["down_proj"], [0, 1])
    tensors = load_file(llama.peft / "adapter_model.safetensors")
    expected = {
        f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{half}.weight" for layer in (0, 1) for half in "AB"
    }
    assert tensors.keys() == expected
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert "--max-lora-rank 8`" in (llama.peft / "README.md").read_text()


def test_the_factors_are_balanced(llama: Exported) -> None:
    tensors = load_file(llama.peft / "adapter_model.safetensors")
    for layer in (0, 1):
        place = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        a, b = (tensors[f"{place}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close((a @ a.T).diagonal(), (b.T @ b).diagonal())


def of_change(deltas: dict[str, Any], family: str = "llama") -> Source:
    return Source.of_patch(shared(family), Patch(deltas))


def random_change(rank: int, size: float = 0.05, seed: int = 0) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(64, rank, generator=made) * size, torch.randn(256, rank, generator=made))


def test_a_change_of_a_higher_rank_is_truncated_to_the_best_there_is(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    delta = random_change(12)
    figures = export(of_change({name: delta}), "peft", tmp_path / "peft", rank=5).figures
    values = torch.linalg.svdvals(delta.dense().double())
    # Eckart and Young: no matrix of that rank is nearer than the sum of the first singular triplets.
    best = float(values[5:].norm() / values.norm())
    assert (figures["rank"], figures["rank_of_change"]) == (5, 12)
    assert figures["relative_error"] == pytest.approx(best, rel=1e-6)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name.replace('.weight', '')}.lora_{half}.weight"] for half in "AB")
    left = float((b.double() @ a.double() - delta.dense()).norm() / delta.dense().double().norm())
    assert left == pytest.approx(best, rel=1e-4)


def test_narrower_changes_are_padded_and_unedited_modules_get_zeros(tmp_path: Path) -> None:
    """What peft would put factors on by name and layer, and was not edited, must do nothing."""
    deltas = {
        "model.layers.0.mlp.down_proj.weight": random_change(1),
        "model.layers.2.mlp.up_proj.weight": LowRank(*reversed(list(random_change(3, seed=1).tensors().values()))),
    }
    found = export(of_change(deltas), "peft", tmp_path / "peft").figures
    assert [found["modules"][name]["rank"] for name in sorted(found["modules"])] == [1, 3]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4
    assert {tuple(t.shape)[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {3}
    base = plain(tiny.trained("llama"), "llama")
    adapted = with_adapter(base, tmp_path / "peft").merge_and_unload()
    for name, weight in shared("llama").model.named_parameters():
        expected = weight + deltas[name].dense() if name in deltas else weight
        torch.testing.assert_close(adapted.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


def test_a_name_that_two_modules_share_is_given_in_full(corpus_path: Path, tmp_path: Path) -> None:
    """GPT-2 calls the outputs of attention and MLP both c_proj, and stores them transposed."""
    export(Source.of_editor(edited("gpt2", corpus_path)), "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["mlp.c_proj"]
    assert config["fan_in_fan_out"] is True
    assert not any("attn" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))


def test_rounding_of_a_long_stream_is_not_taken_for_rank(tmp_path: Path) -> None:
    """Each of many commits rounds the weight to float32; what that adds has full rank and is no edit's."""
    name, lm = "model.layers.1.mlp.down_proj.weight", shared("llama")
    base = lm.model.get_parameter(name)
    now, parts = base.clone(), [random_change(1, 0.01, seed) for seed in range(20)]
    for part in parts:
        now = (now.double() + part.dense().double()).float()
    source = of_change({name: Dense(now.double() - base.double())})
    figures = export(replace(source, roundings=20), "peft", tmp_path / "peft").figures
    assert figures["rank_of_change"] == 20
    assert figures["relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("gpt2", "transformer.wte.weight", "shared by lm_head and transformer.wte"),
        ("llama", "lm_head.weight", "linear layers inside the model's blocks"),
        ("llama", "model.embed_tokens.weight", "linear layers inside the model's blocks"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused(family: str, name: str, reason: str, tmp_path: Path) -> None:
    change = Dense(torch.ones_like(shared(family).model.get_parameter(name)))
    with pytest.raises(NotApplicable, match=reason) as caught:
        export(of_change({name: change}, family), "peft", tmp_path / "peft")
    assert (caught.value.where, caught.value.fix) == (name, "export as merged")
    assert everything(tmp_path) == []


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", ["merged", "peft", "gguf"])
def test_a_memory_beside_the_weights_cannot_be_exported_but_as_a_card(
    kind: str, corpus_path: Path, tmp_path: Path
) -> None:
    editor = make_editor(fresh("llama"), corpus_path, "grace")
    editor.edit(EDITS[0], score=False)
    source = Source.of_editor(editor, [FactRecord(EDITS[0])])
    with pytest.raises(NotApplicable, match="grace keeps its edits in a memory beside the weights") as caught:
        export(source, kind, tmp_path / "out")
    assert "everedit methods ls" in caught.value.fix
    assert everything(tmp_path) == []
    export(source, "card", tmp_path / "out")
    assert EDITS[0].target_new in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["merged", "peft", "gguf"])
def test_there_must_be_an_edit(kind: str, tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no weight has been edited"):
        export(of_change({}), kind, tmp_path / "out")
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("deltas", "error"),
    [
        ({"model.layers.1.mlp.down_proj.weight": Dense(torch.zeros(3, 3))}, "has shape"),
        ({"model.layers.99.mlp.down_proj.weight": Dense(torch.zeros(64, 256))}, "no weight 'model.layers.99"),
        ({"nothing": Dense(torch.zeros(2, 2))}, "no weight 'nothing'"),
    ],
)
@pytest.mark.parametrize("kind", ["merged", "peft", "gguf"])
def test_a_change_of_another_model_is_refused(kind: str, deltas: Any, error: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=error):
        export(of_change(deltas), kind, tmp_path / "out")
    assert everything(tmp_path) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(NumericalError, match="not finite"):
        export(of_change({name: Dense(torch.full((64, 256), torch.inf))}), "merged", tmp_path / "out")
    large = of_change({name: Dense(torch.full((64, 256), 1e5))})
    for kind, option in (("merged", {"dtype": "float16"}), ("gguf", {"type": "f16"})):
        with pytest.raises(NumericalError, match="does not fit into"):
            export(large, kind, tmp_path / "out", **option)
    assert everything(tmp_path) == []


def test_unknown_formats_and_options_are_named(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="merged"):
        export(llama.source, "merge", tmp_path / "out")
    for kind, option in (
        ("peft", {"rank": 0}),
        ("merged", {"dtype": "int8"}),
        ("gguf", {"typ": "f16"}),
        ("card", {"x": 1}),
    ):
        with pytest.raises(EditError, match=next(iter(option))) as caught:
            export(llama.source, kind, tmp_path / "out", **option)
        assert caught.value.where == f"export as {kind}"
    with pytest.raises(ExportError, match="transformers cannot save"):
        export(llama.source, "merged", tmp_path / "out", shard="large")
    assert everything(tmp_path) == []


def test_nothing_is_overwritten(llama: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = everything(tmp_path)
    for name in ("file", "full", "link"):
        with pytest.raises(ExportError, match="overwrite nothing") as caught:
            export(llama.source, "card", tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
    assert everything(tmp_path) == before
    (tmp_path / "empty").mkdir()
    export(llama.source, "card", tmp_path / "empty")
    assert everything(tmp_path / "empty") == ["README.md", "everedit.json"]


# --------------------------------------------------------------------------- whole or absent


# NumPy counts what it could not write, all others say why.
_NO_ROOM = r"cannot be written: .*([Ff]ile too large|requested and \d+ written)"


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write more than so many bytes into a file, as it does where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("kind", "size"), [("merged", 100_000), ("peft", 5_000), ("gguf", 100_000), ("card", 1_000)])
def test_a_write_that_fails_midway_leaves_nothing(kind: str, size: int, llama: Exported, tmp_path: Path) -> None:
    with (
        files_no_larger_than(size),
        pytest.raises(ExportError, match=_NO_ROOM) as caught,
    ):
        export(llama.source, kind, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out")
    assert "space" in caught.value.fix
    assert everything(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_said_to_be_one(llama: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError, match="cannot be written") as caught:
        export(llama.source, "card", tmp_path / "file" / "out")
    assert caught.value.where == str(tmp_path / "file" / "out")


def test_an_interruption_leaves_nothing(llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        assert any(tmp_path.glob(".out.*.partial/model.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(llama.editor.lm.tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(llama.source, "merged", tmp_path / "out")
    assert everything(tmp_path) == []


_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from everedit.export import Source, export
from everedit.models import load_model
from everedit.patch import LowRank, Patch

lm, out, order = load_model(sys.argv[1]), Path(sys.argv[2]), random.Random(0)
made = torch.Generator().manual_seed(0)
change = LowRank(torch.randn(64, 2, generator=made), torch.randn(256, 2, generator=made))
source = Source.of_patch(lm, Patch({"model.layers.1.mlp.down_proj.weight": change}))
export(source, "gguf", out / "first")
for instant in range(30):
    child = os.fork()
    if not child:
        for number in range(1000):
            export(source, ["merged", "peft", "gguf"][(instant + number) % 3], out / f"{instant}-{number}")
            os.write(1, f"{instant}-{number}\\n".encode())  # at once: a line is whole or not there
    time.sleep(order.uniform(0.01, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_process_killed_in_an_export_leaves_whole_exports_alone(tmp_path: Path) -> None:
    """Killed at thirty random instants: what was acknowledged is whole, and nothing half-written can be seen."""
    command = [sys.executable, "-c", _KILLED, str(tiny.trained("llama")), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = [part for part in tmp_path.iterdir() if not part.name.startswith(".")]
    assert {part.name for part in seen} >= set(done.stdout.split())
    hidden = [part for part in tmp_path.iterdir() if part.name.startswith(".")]
    assert len(hidden) > 10, "no process was killed while it wrote"
    files = {"merged": 7, "peft": 4, "gguf": 3}
    for part in seen:
        kind = json.loads((part / "everedit.json").read_text())["format"]
        assert len(list(part.iterdir())) == files[kind], part
        if kind == "gguf":
            assert (part / "model.gguf").read_bytes() == (tmp_path / "first" / "model.gguf").read_bytes()
        else:
            [weights] = part.glob("*.safetensors")
            assert load_file(weights)


def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from everedit.cache import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'large').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert (left / "large").exists()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        assert not left.exists()
    assert everything(tmp_path) == ["out", "out/file"]


def test_of_two_exports_to_one_place_one_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "out") as late:  # noqa: PT012
        (late / "file").write_text("late")
        with atomic_folder(tmp_path / "out") as early:
            # What another is still writing is no left-over.
            assert late.exists()
            (early / "file").write_text("early")
    assert everything(tmp_path) == ["out", "out/file"]
    assert (tmp_path / "out" / "file").read_text() == "early"
