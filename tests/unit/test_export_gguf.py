"""GGUF files in llama.cpp's own runtime, and read back by transformers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.errors import ModelError, NotApplicable
from everedit.export import Source, export
from everedit.export.gguf_tensors import Names, Weights, load_gguf
from everedit.export.gguf_tokenizer import _LLAMA_3
from everedit.models import LanguageModel, load_model
from everedit.models.packaged import ALIASES
from everedit.patch import Dense, LowRank, Patch
from tests.support import facts, llama_cpp, tiny
from tests.support.editing import home_town, make_editor
from tests.support.loading import shared

pytestmark = pytest.mark.usefixtures("own_cache")

CONVERTED = ("llama", "mistral", "qwen2", "qwen3")
EDITS = [home_town(0), home_town(10)]
PROMPTS = [edit.prompt for edit in EDITS] + [fact.prompt for fact in facts.facts()[-3:]]
WEIGHT = "model.layers.1.mlp.down_proj.weight"
# llama.cpp looks some functions up in tables of half precision.
SLACK = 0.03


@dataclass
class Written:
    lm: LanguageModel
    base: list[str]
    edited: list[str]
    file: Path


@pytest.fixture(scope="module", params=CONVERTED)
def written(request: pytest.FixtureRequest, corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model with two edits, and its file in full precision."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVEREDIT_CACHE", str(folder / "cache"))
        editor = make_editor(request.param, corpus_path, "memit")
        base = editor.lm.generate(PROMPTS, max_new_tokens=8)
        editor.edit(EDITS, score=False)
    export(Source.of_editor(editor), "gguf", folder / "out", type="f32")
    return Written(editor.lm, base, editor.lm.generate(PROMPTS, max_new_tokens=8), folder / "out" / "model.gguf")


def worst(lm: LanguageModel, prompt: str, said: dict[str, Any]) -> float:
    """How far llama.cpp's log-probabilities of the likeliest tokens are from the model's, at most, over all steps."""
    row, gaps = list(lm.tokenizer(prompt)["input_ids"]), [0.0]
    for token, top in zip(said["ids"], said["top"], strict=True):
        with torch.no_grad():
            wanted = lm.model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        gaps += [abs(float(wanted[int(other)]) - value) for other, value in top.items()]
        row.append(token)
    return max(gaps)


def test_llama_cpp_gives_the_edited_models_greedy_answers(written: Written) -> None:
    assert [old != new for old, new in zip(written.base, written.edited, strict=True)][:2] == [True, True]
    found = llama_cpp.run(written.file, PROMPTS)
    assert [said["text"] for said in found["said"]] == written.edited
    for prompt, tokens, said in zip(PROMPTS, found["tokens"], found["said"], strict=True):
        assert tokens == written.lm.tokenizer(prompt)["input_ids"]
        assert worst(written.lm, prompt, said) < SLACK


def test_transformers_reads_the_edited_weights_back(written: Written) -> None:
    if written.lm.model.config.model_type in ("mistral", "qwen3"):
        pytest.skip("transformers takes GGUF's Mistral for a llama, and does not read the width of Qwen3's heads")
    back = read_back(written.file)
    for name, weight in written.lm.model.named_parameters():
        assert torch.equal(back.get_parameter(name), weight), name


def read_back(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def test_the_context_is_as_long_as_llama_cpp_computes_the_same(written: Written) -> None:
    """It attends to everything in every layer: where a model's attention slides, no text may be longer than that."""
    reader = GGUFReader(written.file)
    architecture = reader.get_field("general.architecture").contents()
    length = reader.get_field(f"{architecture}.context_length").contents()
    sliding = written.lm.model.config.model_type == "mistral"
    assert length == (tiny.WINDOW if sliding else tiny.MAX_POSITIONS)


# --------------------------------------------------------------------------- types


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def values(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))


def change(size: float = 0.2) -> Patch:
    made = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 1, generator=made), torch.randn(256, 1, generator=made)
    return Patch({WEIGHT: LowRank(left * size, right * size)})


def write(folder: Path, patch: Patch, family: str = "llama", **options: Any) -> tuple[Path, dict[str, Any]]:
    done = export(Source.of_patch(shared(family), patch), "gguf", folder, **options)
    return folder / "model.gguf", dict(done.figures)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q5_1", "q4_0"])
def test_matrices_have_the_type_asked_for_and_the_figures_say_what_it_costs(kind: str, tmp_path: Path) -> None:
    file, figures = write(tmp_path / "out", change(), type=kind)
    found, delta = tensors(file), change().deltas[WEIGHT].dense()
    types = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert {types[name] for name in types if "norm" not in name} == {kind.upper()}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    edited = shared("llama").model.get_parameter(WEIGHT) + delta
    lost = float((values(found["blk.1.ffn_down.weight"]) - edited).norm() / delta.norm())
    assert figures["tensors"][WEIGHT]["type"] == kind.upper()
    assert figures["lost"] == pytest.approx(lost, rel=1e-3, abs=1e-7)
    assert (figures["lost"] < 1e-6) == (kind == "f32")


def test_rows_that_make_no_whole_blocks_are_stored_in_half_precision(tmp_path: Path) -> None:
    """Qwen3's heads here are 24 wide: its attention's output has rows of 96 = 3 blocks, and a narrower one none."""
    lm = shared("qwen3")
    file, _ = write(tmp_path / "out", Patch({WEIGHT: Dense(torch.ones(64, 256) * 0.01)}), "qwen3", type="q8_0")
    assert tensors(file)["blk.0.attn_output.weight"].tensor_type == GGMLQuantizationType.Q8_0
    weights = Weights(load_gguf(), Source.of_patch(lm, Patch({})), lm, Names(load_gguf(), "qwen3", lm), "q8_0")
    assert weights._kind((64, 40)).name == "F16"


# --------------------------------------------------------------------------- begun from a file


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unedited tiny llama, quantised."""
    nothing = Patch({WEIGHT: Dense(torch.zeros(64, 256))})
    return write(tmp_path_factory.mktemp("base") / "out", nothing, type="q8_0")[0]


def test_a_file_that_is_begun_from_keeps_all_but_what_was_edited(base_file: Path, tmp_path: Path) -> None:
    file, figures = write(tmp_path / "out", change(), type="f16", start=base_file)
    before, after = tensors(base_file), tensors(file)
    assert list(before) == list(after)
    differing = {name for name in before if before[name].data.tobytes() != after[name].data.tobytes()}
    assert differing == {"blk.1.ffn_down.weight"}
    assert (figures["from"], list(figures["tensors"])) == ("a GGUF file of the base", [WEIGHT])
    edited = shared("llama").model.get_parameter(WEIGHT) + change().deltas[WEIGHT].dense()
    assert torch.equal(values(after["blk.1.ffn_down.weight"]), edited.half().float())
    kept, fields = (
        {name: field.contents() for name, field in GGUFReader(part).fields.items() if not name.startswith("GGUF.")}
        for part in (base_file, file)
    )
    assert fields.items() >= kept.items()
    assert fields["everedit.base_fingerprint"] == shared("llama").fingerprint
    assert (
        llama_cpp.run(file, PROMPTS[2:3])["said"][0]["text"]
        == shared("llama").generate(PROMPTS[2:3], max_new_tokens=8)[0]
    )


def test_queries_and_keys_find_their_place_in_it(base_file: Path, tmp_path: Path) -> None:
    """GGUF interleaves the halves of each head in a llama's queries and keys: transformers undoes it on reading."""
    deltas = {}
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight = f"model.layers.2.self_attn.{name}.weight"
        made = torch.Generator().manual_seed(number)
        deltas[weight] = Dense(torch.randn(shared("llama").model.get_parameter(weight).shape, generator=made))
    file, _ = write(tmp_path / "out", Patch(deltas), type="f32", start=base_file)
    back = read_back(file)
    for name, delta in deltas.items():
        assert torch.equal(back.get_parameter(name), shared("llama").model.get_parameter(name) + delta.dense())


def test_a_file_of_another_model_is_refused(base_file: Path, tmp_path: Path) -> None:
    lm = shared("mistral")
    with pytest.raises(ModelError, match="not one of the unedited model") as caught:
        export(Source.of_patch(lm, change()), "gguf", tmp_path / "out", start=base_file)
    assert caught.value.where == str(base_file)
    # A relative whose norms are the same is known by the weight itself.
    near = load_model(tiny.trained("llama"), device="cpu")
    near.model.get_parameter(WEIGHT).neg_()
    with pytest.raises(ModelError, match=r"its tensor blk\.1\.ffn_down\.weight is not the model's"):
        export(Source.of_patch(near, change()), "gguf", tmp_path / "out", start=base_file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "empty"])
def test_a_damaged_file_is_refused(damage: str, base_file: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.gguf"
    raw = base_file.read_bytes()
    if damage != "missing":
        start.write_bytes({"text": b"no model at all", "cut": raw[: len(raw) // 2], "empty": b""}[damage])
    with pytest.raises(ModelError, match="no GGUF file that can be read") as caught:
        write(tmp_path / "out", change(), start=start)
    assert caught.value.where == str(start)
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(not ALIASES["smollm2-135m"].is_installed, reason=ALIASES["smollm2-135m"].install)
def test_a_packaged_model_is_begun_from_its_own_file(
    corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All exports of a real model, with the answers of the runtimes that they are for."""
    monkeypatch.delenv("EVEREDIT_CACHE")
    lm = load_model("smollm2-135m", device="cpu")
    edit = Edit(prompt="The capital of Kenya is", subject="Kenya", target_new="Cairo")
    editor = Editor(lm, "rome", corpus=Corpus(corpus_path, 2048, 128))
    editor.bench.moments.root = corpus_path.parent
    editor.edit(edit, score=False)
    prompts = [edit.prompt, "The chemical symbol of gold is"]
    wanted = lm.generate(prompts, max_new_tokens=4)
    assert "Cairo" in wanted[0]
    source = Source.of_editor(editor)
    export(source, "gguf", tmp_path / "gguf")
    packaged, file = ALIASES["smollm2-135m"].gguf(tmp_path), tmp_path / "gguf" / "model.gguf"
    assert [said["text"] for said in llama_cpp.run(file, prompts, new=4)["said"]] == wanted
    assert "Cairo" not in llama_cpp.run(packaged, prompts, new=4)["said"][0]["text"]
    assert (tmp_path / "gguf" / "LICENCE.txt").read_text().startswith("SmolLM2")
    found = export(source, "peft", tmp_path / "peft").figures
    assert found["rank"] == 1
    assert found["relative_error"] < 1e-4
    export(source, "merged", tmp_path / "merged")
    ids = torch.tensor([lm.tokenizer(f"{edit.prompt} Cairo")["input_ids"]])
    with torch.no_grad():
        logits = lm.model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(merged(ids).logits, logits)
        del merged
        editor.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path / "peft").eval()
        torch.testing.assert_close(adapted(ids).logits, logits, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------- conversion: what differs between models


def untrained(tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> LanguageModel:
    """A llama with random weights, large enough that its answers are far from even, and some ids without a token."""
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, device="cpu")


def write_untrained(lm: LanguageModel, folder: Path) -> Path:
    patch = Patch({WEIGHT: Dense(torch.full((64, 128), 0.01))})
    export(Source.of_patch(lm, patch), "gguf", folder, type="f32")
    lm.model.get_parameter(WEIGHT).add_(0.01)
    return folder / "model.gguf"


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": LLAMA_3},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24},
        {"tie_word_embeddings": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_llama_cpp_computes_what_the_config_says(settings: dict[str, Any], tmp_path: Path) -> None:
    words = " ".join(facts.sentences()[:4]).split(" ")
    texts = [" ".join(words[:count]) for count in range(2, len(words), 2)]
    lm = untrained(tiny.build_tokenizer("llama"), tmp_path / "model", **settings)
    plain = untrained(tiny.build_tokenizer("llama"), tmp_path / "plain")
    file = write_untrained(lm, tmp_path / "out")
    found = llama_cpp.run(file, texts, new=1, context=256)["said"]
    # Of a token that is half a character, which a random model may well say, llama.cpp gives no probability.
    said = [(text, one) for text, one in zip(texts, found, strict=True) if one["ids"]]
    assert len(said) > 2
    assert max(worst(lm, *one) for one in said) < SLACK
    assert max(worst(plain, *one) for one in said) > 10 * SLACK, "the setting makes no difference"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "scaled by 'yarn'"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(settings: Any, reason: str, tmp_path: Path) -> None:
    lm = untrained(tiny.build_tokenizer("llama"), tmp_path / "model", **settings)
    with pytest.raises(NotApplicable, match=reason) as caught:
        write_untrained(lm, tmp_path / "out")
    assert "convert_hf_to_gguf.py" in caught.value.fix


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_other_architectures_are_sent_to_llama_cpps_converter(family: str, tmp_path: Path) -> None:
    name = {"gpt2": "transformer.h.1.mlp.c_proj.weight", "gemma2": WEIGHT}.get(
        family, "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    )
    with pytest.raises(NotApplicable, match=f"models of type '{family}' are not converted") as caught:
        write(tmp_path / "out", Patch({name: Dense(torch.ones(64, 256))}), family)
    assert "convert_hf_to_gguf.py" in caught.value.fix
    assert "start=FILE" in caught.value.fix


# --------------------------------------------------------------------------- tokenizers

TEXTS = [
    "In 2024 the 1234567 people didn't say: I'LL go, they've gone.",
    "Zoë's café\n\n\n  costs 12,50 €\t— naïve?  日本語 🙂 ",
    " leading and trailing ",
    "x = [1, 2];\r\nreturn f(x)",
]


def byte_level(*steps: pre_tokenizers.PreTokenizer, use_regex: bool = False, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, ["<s>", "</s>"], alphabet)


def pieces(space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    codes = [f"<0x{number:02X}>" for number in range(256)]
    return trained(tokenizer, ["<unk>", "<s>", "</s>", *codes], [])


def trained(tokenizer: Tokenizer, specials: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        [*facts.sentences(), *TEXTS[:1] * 5, *facts.WORDS, "1234 2024 didn't they've"], trainer
    )
    return tokenizer


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


TOKENIZERS = {
    "gpt-2": lambda: byte_level(use_regex=True),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: byte_level(split(_LLAMA_3), ignore_merges=True),
    "qwen2": lambda: byte_level(split(_LLAMA_3.replace("{1,3}", ""))),
    "pieces": lambda: pieces(True),
    "pieces without a space in front": lambda: pieces(False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), **special)
    tokenizer.chat_template = "{{ messages }}"
    lm = untrained(tokenizer, tmp_path / "model")
    file = write_untrained(lm, tmp_path / "out")
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert llama_cpp.run(file, TEXTS, new=1, context=512)["tokens"] == expected
    reader = GGUFReader(file)
    assert reader.get_field("tokenizer.ggml.pre").contents() == ("default" if kind.startswith("pieces") else kind)
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ messages }}"


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    for number, made in enumerate((byte_level(split(r"\w+")), byte_level(split(_LLAMA_3)))):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
        lm = untrained(tokenizer, tmp_path / f"model{number}")
        with pytest.raises(NotApplicable, match="no tokenizer like the model's"):
            write_untrained(lm, tmp_path / "out")
