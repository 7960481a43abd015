"""Layouts: found by model_type or by structure, never by name or path; what cannot be found is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from everedit.errors import EvereditError, ModelError, NotApplicable, UnknownName
from everedit.methods import method_class, method_names
from everedit.models import LanguageModel, load_model
from everedit.models.families import families, family_for
from everedit.models.hooks import capture
from everedit.models.layout import Layout, oriented
from tests.support import tiny
from tests.support.loading import DECODERS, fresh, shared

EXPECTED = {
    "gpt2": ("gpt2", "transformer.h.1.mlp.c_proj.weight"),
    "gptj": ("gptj", "transformer.h.1.mlp.fc_out.weight"),
    "gpt_neo": ("gpt_neo", "transformer.h.1.mlp.c_proj.weight"),
    "gpt_neox": ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"),
    "opt": ("opt", "model.decoder.layers.1.fc2.weight"),
    "llama": ("llama", "model.layers.1.mlp.down_proj.weight"),
    "mistral": ("llama", "model.layers.1.mlp.down_proj.weight"),
    "qwen2": ("llama", "model.layers.1.mlp.down_proj.weight"),
    "qwen3": ("llama", "model.layers.1.mlp.down_proj.weight"),
    "gemma2": ("gemma", "model.layers.1.mlp.down_proj.weight"),
    "gemma3_text": ("gemma", "model.layers.1.mlp.down_proj.weight"),
    "phi3": ("phi3", "model.layers.1.mlp.down_proj.weight"),
    "t5": ("t5", "decoder.block.1.layer.2.DenseReluDense.wo.weight"),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_found_by_model_type(family: str) -> None:
    layout = shared(family).layout
    name, weight = EXPECTED[family]
    assert layout.family.name == name
    assert layout.mlp_out_weight(1) == weight
    assert weight in dict(layout.model.named_parameters())
    assert layout.n_layers == (3 if family == "t5" else 4)
    assert (layout.hidden_size, layout.inner_size) == (64, 256)
    described = layout.describe()
    assert described["mlp_out_stored_transposed"] is (family == "gpt2")
    assert described["tied_embeddings"] is (family in tiny.TIED)
    assert described["decoder_only"] is (family != "t5")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_name_resolves_in_every_block(family: str) -> None:
    layout = shared(family).layout
    for index in range(layout.n_layers):
        block = layout.block(index)
        for name in (*layout.mlp_in_names, layout.family.mlp_out, layout.family.attention_out):
            assert isinstance(block.get_submodule(name), (nn.Linear, Conv1D)), name
        assert oriented(layout.mlp_out(index)).shape == (layout.hidden_size, layout.inner_size)
    assert "norm" in type(layout.model.get_submodule(layout.family.final_norm)).__name__.lower()
    assert layout.module_of(layout.mlp_out_weight(2)) is layout.mlp_out(2)


@pytest.mark.parametrize("family", DECODERS)
def test_oriented_weight_maps_keys_to_values(family: str) -> None:
    """W k + b is what the module computes, whichever way round W is stored; the view writes through."""
    lm = shared(family)
    module = lm.layout.mlp_out(2)
    with torch.no_grad(), capture({"key": module}, {"value": module}, rows=2) as seen:
        lm.states(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert seen["key"].shape == (2, 3, lm.layout.inner_size)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(seen["key"] @ oriented(module).T + bias, seen["value"])
    assert oriented(module).data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_models_own(family: str, dtype: str) -> None:
    lm = shared(family, dtype)
    lm.check_logits()
    ids = torch.tensor([[3, 40, 50, 60]])
    with torch.no_grad():
        own, found = lm.model(input_ids=ids).logits.float(), lm.logits(lm.states(input_ids=ids))
    assert found.dtype == torch.float32
    assert float((own - found).abs().max()) <= (1e-4 if dtype == "float32" else 0.02) * float(own.abs().max())


def test_unknown_scaling_of_logits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh("llama")
    head = lm.model.get_output_embeddings()
    forward = type(lm.model).forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(type(lm.model), "forward", scaled)
    with pytest.raises(ModelError, match=r"changes its logits .*\n.*LanguageModel\.logits"):
        lm.check_logits()
    assert head is lm.model.get_output_embeddings()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlp_output_reaches_the_residual(family: str, dtype: str) -> None:
    lm = shared(family, dtype)
    lm.layout.require_mlp_in_residual("rome")
    norm = lm.layout.mlp_norm(0)
    assert (norm is not None) is family.startswith("gemma")
    # The check sees through the family's claim: without its norm, Gemma must fail.
    if norm is not None:
        without = Layout(family_for("llama"), lm.model, lm.layout.n_layers, 64, 256, ("mlp.gate_proj", "mlp.up_proj"))
        with pytest.raises(NotApplicable):
            without.require_mlp_in_residual("rome")


def test_residual_step_moves_the_stream_through_a_norm() -> None:
    """After a norm only directions count: the step turns the output so that the normed sum points as wanted."""
    layout = shared("gemma2").layout
    norm = layout.mlp_norm(1)
    torch.manual_seed(0)
    now, residual = torch.randn(5, 64), 0.3 * torch.randn(5, 64)
    with torch.no_grad():
        step = layout.residual_step(1, now, residual)
        moved, wanted = norm(now + step), norm(now) + residual
        scale = norm(torch.ones_like(now))
    torch.testing.assert_close((now + step).norm(dim=-1), now.norm(dim=-1))
    torch.testing.assert_close(
        nn.functional.normalize(moved / scale, dim=-1), nn.functional.normalize(wanted / scale, dim=-1)
    )
    assert shared("llama").layout.residual_step(1, now, residual) is residual


def _save(model: nn.Module, folder: Path) -> Path:
    """Save a model with the tokenizer of the tiny GPT-2."""
    model.save_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny.trained("gpt2"))
    tokenizer.save_pretrained(folder)
    return folder


def _ids() -> dict[str, int]:
    tokenizer = shared("gpt2").tokenizer
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _gated(**more: object) -> dict[str, object]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, **heads, **_ids(), **more}


def _unknown(kind: str) -> nn.Module:
    """Return a random tiny model of a type that no family file names."""
    config = {
        "gpt_bigcode": lambda: hf.GPTBigCodeConfig(
            n_positions=64, n_embd=32, n_layer=3, n_head=4, n_inner=128, **_ids()
        ),
        "starcoder2": lambda: hf.Starcoder2Config(**_gated()),
        "falcon": lambda: hf.FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **_ids()),
        "glm": lambda: hf.GlmConfig(**_gated(head_dim=8)),
        "olmo2": lambda: hf.Olmo2Config(**_gated()),
        "mamba": lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **_ids()),
        "bart": lambda: hf.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
            **_ids(), decoder_start_token_id=0, forced_eos_token_id=None,
        ),
    }[kind]()  # fmt: skip
    auto = hf.AutoModelForSeq2SeqLM if kind == "bart" else hf.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return auto.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "mlp_in", "mlp_out", "attention_out", "norm"),
    [
        ("gpt_bigcode", ("mlp.c_fc",), "mlp.c_proj", "attn.c_proj", "transformer.ln_f"),
        ("starcoder2", ("mlp.c_fc",), "mlp.c_proj", "self_attn.o_proj", "model.norm"),
        ("falcon", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "self_attention.dense", "transformer.ln_f"),
        ("glm", ("mlp.gate_up_proj",), "mlp.down_proj", "self_attn.o_proj", "model.norm"),
        ("olmo2", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "self_attn.o_proj", "model.norm"),
    ],
)
def test_discovers_an_unknown_type(kind: str, mlp_in, mlp_out: str, attention_out: str, norm: str) -> None:
    assert family_for(kind) is None
    layout = Layout.of(_unknown(kind))
    assert layout.family.name == f"{kind} (discovered)"
    assert layout.n_layers == 3
    assert (layout.mlp_in_names, layout.family.mlp_out) == (mlp_in, mlp_out)
    assert (layout.family.attention_out, layout.family.final_norm) == (attention_out, norm)
    assert oriented(layout.mlp_out(1)).shape == (32, 96 if kind in ("starcoder2", "glm", "olmo2") else 128)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox", "phi3"])
def test_discovery_agrees_with_the_family_file(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = shared(family).layout
    monkeypatch.setattr("everedit.models.layout.family_for", lambda _: None)
    found = Layout.of(known.model)
    assert found.family.name == f"{family} (discovered)"
    for part in ("blocks", "mlp_out", "attention_out", "final_norm"):
        assert getattr(found.family, part) == getattr(known.family, part), part
    assert sorted(found.mlp_in_names) == sorted(known.mlp_in_names)


def test_what_cannot_be_discovered_is_named() -> None:
    with pytest.raises(ModelError, match=r"'mamba'.*an attention output projection") as caught:
        Layout.of(_unknown("mamba"))
    assert "models/families" in caught.value.fix


def test_all_missing_parts_are_named_at_once() -> None:
    model = _unknown("falcon")
    for block in model.transformer.h:
        del block.mlp
    model.transformer.ln_f = nn.Identity()
    with pytest.raises(ModelError, match=r"MLP output projection.*final norm"):
        Layout.of(model)


def test_encoder_decoder_without_a_file() -> None:
    with pytest.raises(ModelError, match="encoder-decoder model_type 'bart' has no family file"):
        Layout.of(_unknown("bart"))


def test_a_model_that_breaks_its_types_promise() -> None:
    model = fresh("llama").model
    del model.model.layers[0].self_attn.o_proj
    with pytest.raises(ModelError, match=r"attention's output projection at 'self_attn\.o_proj'"):
        Layout.of(model)
    model = fresh("gpt2").model
    del model.transformer.h[0].mlp.c_fc
    with pytest.raises(ModelError, match=r"no MLP input projection mlp\.c_fc"):
        Layout.of(model)


def test_no_model_type_has_two_files() -> None:
    types = [kind for family in families() for kind in family.model_types]
    assert len(types) >= 13
    assert len(types) == len(set(types))


@pytest.mark.parametrize("layer", [-1, 4])
def test_no_such_layer(layer: int) -> None:
    layout = shared("llama").layout
    for ask in (layout.block, layout.mlp_out, layout.mlp_out_weight):
        with pytest.raises(ModelError, match=rf"no layer {layer}\b.*\n.*between 0 and 3"):
            ask(layer)


# ------------------------------------------------------------------ models that ROME and MEMIT must refuse


@pytest.mark.parametrize("method", method_names())
def test_t5_loads_and_is_refused_where_a_decoder_is_needed(method: str) -> None:
    layout = shared("t5").layout
    kind = method_class(method)
    if kind.traits.encoder_decoder:
        kind(kind.Config().resolved(layout)).check(layout)
        return
    with pytest.raises(NotApplicable, match=f"{method} works on decoder-only models, and t5"):
        kind(kind.Config().resolved(layout)).check(layout)


def _post_norm_opt() -> nn.Module:
    config = hf.OPTConfig(
        hidden_size=32, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, do_layer_norm_before=False, **_ids(),
    )  # fmt: skip
    return hf.AutoModelForCausalLM.from_config(config)


def _granite() -> nn.Module:
    return hf.AutoModelForCausalLM.from_config(hf.GraniteConfig(**_gated(residual_multiplier=0.5)))


@pytest.mark.parametrize("make", [_post_norm_opt, _granite, lambda: _unknown("olmo2")], ids=["opt", "granite", "olmo2"])
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_changed_mlp_output_is_refused(make, method: str, tmp_path: Path) -> None:
    """Post-norm blocks and scaled residuals load, and locate-then-edit says that it cannot edit them."""
    lm = load_model(_save(make(), tmp_path / "model"), device="cpu")
    kind = method_class(method)
    ready = kind(kind.Config().resolved(lm.layout))
    with pytest.raises(NotApplicable, match=f"^{method} writes values into the residual stream.*model_type"):
        ready.check(lm.layout)
    assert not lm.layout.block(0)._forward_hooks


def test_post_norm_opt_has_no_final_norm() -> None:
    layout = Layout.of(_post_norm_opt())
    assert layout.describe()["final_norm"] is None
    assert shared("opt").layout.describe()["final_norm"] == "model.decoder.final_layer_norm"


# ------------------------------------------------------------------ loading


def _copied(family: str, folder: Path) -> Path:
    shutil.copytree(tiny.trained(family), folder)
    return folder


def test_the_folders_name_plays_no_part(tmp_path: Path) -> None:
    lm = load_model(_copied("qwen3", tmp_path / "my gpt2 (copy)"), device="cpu")
    assert lm.layout.family.name == "llama"
    assert lm.fingerprint == shared("qwen3").fingerprint
    assert not lm.model.training
    assert not any(weight.requires_grad for weight in lm.model.parameters())


def test_dtype_asked_for(tmp_path: Path) -> None:
    assert fresh("llama").dtype == torch.float32
    assert fresh("llama", "bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="'int8' is not a dtype for weights"):
        fresh("llama", "int8")
    with pytest.raises(ModelError, match="'abacus' is not a device"):
        load_model(tiny.trained("llama"), device="abacus")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    folder = _copied("llama", tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"weight '{name}' holds values that are not finite"):
        load_model(folder, device="cpu")


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = _copied("llama", tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="tokenizer") as caught:
        load_model(folder, device="cpu")
    assert caught.value.where == str(folder)
    assert "tokenizer.json" in caught.value.fix


def test_truncated_weights(tmp_path: Path) -> None:
    folder = _copied("llama", tmp_path / "short")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(folder, device="cpu")


def test_unknown_alias_shows_near_names() -> None:
    with pytest.raises(UnknownName, match=r"unknown model 'smolm2-135m'.*\n.*smollm2-135m"):
        load_model("smolm2-135m")


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0")
    with pytest.raises(ModelError, match="this is a file"):
        load_model(file)
    with pytest.raises(ModelError, match="no such folder"):
        load_model(tmp_path / "nowhere")


def test_load_errors_are_everedits_own() -> None:
    assert issubclass(ModelError, EvereditError)
    assert issubclass(UnknownName, EvereditError)
    assert isinstance(shared("gpt2"), LanguageModel)
